"""Manifests: written, read, verified, and refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest

from asd_rt.errors import EngineError
from asd_rt.manifest import (
    FORMAT_VERSION,
    SEAL,
    Part,
    TensorSpec,
    from_json,
    manifest_path,
    part_path,
    read_manifest,
    sha256_file,
    verify,
    write_manifest,
)

MEND = "python -m export.build --steps 1 --force"


def one_line(error: pytest.ExceptionInfo[EngineError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def edit(toy, **fields) -> None:
    path = manifest_path(toy.path)
    document = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in document.items() if v != "absent"}))


def test_comes_back_as_it_was_written(own_toy) -> None:
    manifest = read_manifest(own_toy.path)
    assert manifest == own_toy.manifest
    assert manifest.parts["denoiser"].inputs["past_k.0"] == TensorSpec("float32", (1, "P", 12))
    verify(own_toy.path, manifest)
    assert part_path(own_toy.path, manifest, "time").name == "toy_fp32.time.onnx"
    assert sorted(p.suffix for p in own_toy.path.parent.iterdir()) == [".json"] + [".onnx"] * 6


def test_writing_fails_whole(own_toy, monkeypatch) -> None:
    before = manifest_path(own_toy.path).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EngineError, match="No space left"):
        write_manifest(own_toy.path, own_toy.manifest)
    assert manifest_path(own_toy.path).read_bytes() == before
    assert len(list(own_toy.path.parent.iterdir())) == 7


def test_engine_missing(tmp_path) -> None:
    with pytest.raises(EngineError) as error:
        read_manifest(tmp_path / "none.onnx")
    assert "none.onnx: expected an engine file, found nothing" in one_line(error)
    assert MEND in str(error.value)


def test_manifest_missing(own_toy) -> None:
    manifest_path(own_toy.path).unlink()
    with pytest.raises(EngineError) as error:
        read_manifest(own_toy.path)
    assert "no manifest" in one_line(error)
    assert MEND in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b"null"])
def test_manifest_is_not_json(own_toy, content) -> None:
    manifest_path(own_toy.path).write_bytes(content)
    with pytest.raises(EngineError) as error:
        read_manifest(own_toy.path)
    assert "JSON" in one_line(error)
    assert MEND in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "newer asd-rt"),
        ({"format_version": 0}, f"expected format_version {FORMAT_VERSION}, found 0"),
        ({"format_version": "absent"}, f"expected format_version {FORMAT_VERSION}, found None"),
        ({"colour": 1}, "unknown fields colour"),
        ({"fps": "absent", "tools": "absent"}, "missing fields fps, tools"),
        ({"precision": "fp12"}, "precision must be one of"),
        ({"backend": "tvm"}, "backend must be one of"),
        ({"latent_hw": [3, 4]}, "latent_hw must be null or two even sizes"),
        ({"timestep_shift": -1}, "timestep_shift must be a number > 0"),
        ({"default_plan": {"steps": 9, "first_steps": 4}}, "default_plan"),
        ({"default_plan": {"steps": 1}}, "default_plan"),
        ({"fps": 0}, "fps must be a whole number >= 1"),
        ({"display_scale": 1.5}, "display_scale"),
        ({"tokenizer": {"kind": "bpe", "words": {}}}, "tokenizer"),
        ({"tokenizer": {"kind": "umt5", "max_tokens": 0}}, "tokenizer must be"),
        ({"tokenizer": {"kind": "umt5"}}, "tokenizer must be"),
        ({"tokenizer": {"kind": "umt5", "max_tokens": 512}}, "missing text_weights, tokenizer"),
        ({"sources": {"text": {"name": "umt5"}}}, 'sources must name their "parts"'),
        ({"sources": {"text": {"parts": "text"}}}, 'sources must name their "parts"'),
        ({"model": 3}, "model must be an object"),
        ({"model": {"dim": 3}}, "missing"),
        ({"cache": {"block_frames": 0}}, "block_frames must be a whole number >= 1"),
        ({"cache": {"block_frames": 3, "windw_frames": 1}}, "unknown key windw_frames"),
        ({"parts": {}}, "missing denoiser, time, prompt"),
        ({"parts": []}, "parts must be an object"),
        ({"gpus": "sm89"}, "gpus must be a list"),
        ({"parity": None}, "parity must be an object"),
    ],
)
def test_wrong_fields(own_toy, fields, message) -> None:
    edit(own_toy, **fields)
    with pytest.raises(EngineError, match=message) as error:
        read_manifest(own_toy.path)
    assert str(manifest_path(own_toy.path)) in one_line(error)
    assert MEND in str(error.value)


def changed(document: Any, where: str, value: Any) -> None:
    *folders, name = where.split("/")
    for folder in folders:
        document = document[folder]
    assert document[name] != value
    document[name] = value


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("gpus", ["sm89", "sm120"]),
        ("name", "other"),
        ("precision", "fp16"),
        ("runtime", "openvino"),
        ("model/eps", 1e-5),
        ("cache/window_frames", 3),
        ("cache/sink_frames", 1),
        ("latent_hw", [2, 4]),
        ("timestep_shift", 5.5),
        ("step_lists/1/sigmas", [0.999]),
        ("default_plan/steps", 2),
        ("fps", 24),
        ("tokenizer/words/red", 2),
        ("codec/spatial", 8),
        ("parts/time/inputs", {}),
        ("parts/decoder/outputs/frames/dtype", "float16"),
        ("checkpoint/name", "another"),
        ("tools/onnx", "0.0"),
        ("parity/pass/denoiser", 0.0),
        ("sources/text", {"name": "umt5", "parts": []}),
    ],
)
def test_a_plausible_edit(own_toy, respell, where, value) -> None:
    """Every field keeps its form, so that only the seal can tell."""
    sigmas = {"1": {"timesteps": [1000.0], "sigmas": [1.0]}}
    cache = replace(own_toy.manifest.cache, window_frames=9, max_frames=0)
    parity, sources = {"pass": {"denoiser": 0.5}}, {"text": {"parts": []}}
    respell(own_toy, step_lists=sigmas, cache=cache, parity=parity, sources=sources)
    path = manifest_path(own_toy.path)
    document = json.loads(path.read_text())
    changed(document, where, value)
    path.write_text(json.dumps(document))
    with pytest.raises(EngineError, match="was edited after it was written") as error:
        read_manifest(own_toy.path)
    assert str(path) in one_line(error) and MEND in str(error.value)


def test_another_spelling_is_no_edit(own_toy) -> None:
    path = manifest_path(own_toy.path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(document.items()))))
    assert read_manifest(own_toy.path) == own_toy.manifest


@pytest.mark.parametrize("told", ["0" * 64, None, 3])
def test_the_seal_itself(own_toy, told) -> None:
    edit(own_toy, **{SEAL: told})
    with pytest.raises(EngineError, match="was edited after it was written"):
        read_manifest(own_toy.path)


def test_a_manifest_without_a_seal(own_toy) -> None:
    edit(own_toy, **{SEAL: "absent"})
    with pytest.raises(EngineError, match=f"its {SEAL} says None"):
        read_manifest(own_toy.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "/etc/passwd"}, "relative path"),
        ({"file": "../other.onnx"}, "relative path"),
        ({"sha256": "abc"}, "64 hexadecimal digits"),
        ({"bytes": -1}, "bytes must be"),
        ({"speed": 3}, "unknown key speed"),
        ({"inputs": None}, "inputs must be an object"),
        (
            {"inputs": {"latents": {"dtype": "float32", "shape": [1.5]}}},
            "whole numbers and symbols",
        ),
    ],
)
def test_wrong_parts(own_toy, change, message) -> None:
    document = own_toy.manifest.to_json()
    document["parts"]["time"] |= change
    with pytest.raises(EngineError, match=f"parts.time.*{message}"):
        from_json(document)


def test_unknown_part(own_toy) -> None:
    document = own_toy.manifest.to_json()
    document["parts"]["vae"] = document["parts"]["time"]
    with pytest.raises(EngineError, match="unknown part vae"):
        from_json(document)


def test_truncated(own_toy) -> None:
    own_toy.path.write_bytes(own_toy.path.read_bytes()[:-10])
    with pytest.raises(EngineError, match=r"damaged denoiser part: expected \d+ bytes") as error:
        verify(own_toy.path, own_toy.manifest)
    assert MEND in one_line(error)


@pytest.mark.parametrize("part", ["denoiser", "time", "decoder"])
def test_a_byte_flipped(own_toy, part) -> None:
    path = part_path(own_toy.path, own_toy.manifest, part)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match=f"damaged {part} part: expected sha256") as error:
        verify(own_toy.path, own_toy.manifest)
    assert MEND in one_line(error)


def test_part_missing(own_toy) -> None:
    part_path(own_toy.path, own_toy.manifest, "text").unlink()
    with pytest.raises(EngineError, match="text part cannot be read: No such file") as error:
        verify(own_toy.path, own_toy.manifest)
    assert MEND in one_line(error)


def test_renamed_engine(own_toy) -> None:
    other = own_toy.path.with_name("other.onnx")
    own_toy.path.rename(other)
    manifest_path(own_toy.path).rename(manifest_path(other))
    with pytest.raises(EngineError, match="rename the files back"):
        verify(other, read_manifest(other))


def test_a_part_that_the_engine_lacks(own_toy) -> None:
    with pytest.raises(EngineError, match="no encoder part"):
        part_path(own_toy.path, own_toy.manifest, "encoder")


def test_sha256_file(tmp_path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_file(path).startswith("ba7816bf8f01cfea")
    assert Part("abc", sha256_file(path), 3).bytes == 3
