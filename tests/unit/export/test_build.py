"""The build command: what it makes, what it leaves alone, and one line for everything that is wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from asd_rt.config import CacheConfig
from asd_rt.errors import BackendError
from asd_rt.manifest import read_manifest, verify
from asd_rt.manifest_schema import PART_NAMES
from export import engine as engine_module
from export import parity
from export.build import main, make_parser
from export.tensorrt import _set_targets


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def build(student: Path, out: Path, *words: str, target: str = "onnx") -> int:
    return main(["--checkpoint", str(student), "--target", target, "--out", str(out), *words])


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "engines"
    shutil.copytree(built, folder)
    return folder


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to export is a failure of the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("an export was begun")

    monkeypatch.setattr(engine_module, "export_part", refuse)


def test_engine_verifies_and_says_what_the_checkpoint_said(built: Path) -> None:
    path = built / "asd_fp32.onnx"
    manifest = read_manifest(path)
    verify(path, manifest)
    added = {"text_weights", "tokenizer", "decoder_first", "encoder_first", "codec_weights"}
    added |= {"build_log", "text_log", "codec_log"}  # of plans
    assert set(manifest.parts) == set(PART_NAMES) - added
    assert manifest.codec == {"kind": "linear", "spatial": 4, "temporal": 1}
    assert manifest.cache == CacheConfig(block_frames=2, window_frames=6, sink_frames=1)
    assert (manifest.latent_hw, manifest.timestep_shift, manifest.fps) == ((4, 2), 3.0, 8)
    assert manifest.default_plan == {"steps": 1, "first_steps": 4}
    assert manifest.tokenizer == {"kind": "vocabulary", "words": {"red": 1, "a": 0}}
    assert set(manifest.step_lists) == {"1", "2", "3", "4"}
    assert manifest.parity["pass"].keys() == manifest.parts.keys() - {"weights"}
    assert max(manifest.parity["pass"].values()) <= 1e-5
    reports = [f"asd_fp32.onnx.parity.{kind}" for kind in ("json", "md")]
    assert sorted(p.name for p in built.iterdir()) == sorted(
        ["asd_fp32.onnx.json", *reports, *(part.file for part in manifest.parts.values())]
    )


def test_graphs_follow_the_contract(built: Path) -> None:
    manifest = read_manifest(built / "asd_fp32.onnx")
    for name, part in manifest.parts.items():
        if name == "weights":
            assert not part.inputs and not part.outputs
            continue
        model = onnx.load(built / part.file)
        assert model.graph.name == name
        for values, specs in ((model.graph.input, part.inputs), (model.graph.output, part.outputs)):
            assert [v.name for v in values] == list(specs)
            for value in values:
                dims = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                assert dims == specs[value.name].shape
        assert "/home" not in str(model)[:100_000]
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    denoiser = manifest.parts["denoiser"]
    assert denoiser.inputs["past_k.0"].shape == (1, "P", 32)
    assert denoiser.inputs["latents"].shape == (1, "F", 2, 4, 2)
    assert manifest.parts["joined"].inputs["mask"].shape == ("T", "S")


def test_exact_half_weights_are_stored_as_half(built: Path) -> None:
    model = onnx.load(built / "asd_fp32.time.onnx")
    stored = {t.name: t.data_type for t in model.graph.initializer}
    assert onnx.TensorProto.FLOAT16 in stored.values()


@pytest.mark.usefixtures("no_export")
def test_up_to_date_engine_is_left_alone(
    copy: Path, student: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(copy)
    with caplog.at_level(logging.INFO):
        assert build(student, copy) == 0
    assert "up to date" in caplog.text
    assert files(copy) == before
    assert json.loads(capsys.readouterr().out) == {"engines": [str(copy / "asd_fp32.onnx")]}


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--steps", "2"), "default_plan"),
        (("--window-frames", "4"), "cache"),
        (("--timestep-shift", "8"), "timestep_shift"),
    ],
)
def test_differing_engine_needs_force(
    copy: Path, student: Path, words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(copy)
    assert build(student, copy, *words) == 1
    error = capsys.readouterr().err
    assert told in error
    assert "--force" in error
    assert error.count("\n") == 1
    assert files(copy) == before


def test_force_replaces_a_damaged_engine_and_the_same_checkpoint_gives_the_same_bytes(
    copy: Path, student: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((copy / "asd_fp32.onnx").read_bytes())
    content[1000] ^= 1
    (copy / "asd_fp32.onnx").write_bytes(content)
    (copy / "asd_fp32.old.onnx").write_bytes(b"a part of an older engine")
    assert build(student, copy) == 1
    assert "damaged" in capsys.readouterr().err
    assert build(student, copy, "--force") == 0
    assert files(copy) == files(built)


def test_missed_parity_leaves_nothing(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(parity.BUDGETS, "fp32", parity.Budget(1e-12, 1e-12))
    assert build(student, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "parity" in error
    assert "denoiser" in error
    assert "> 1e-12" in error
    assert "most arises in" in error
    assert "--allow-inaccurate" in error
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_module, "engine_parts", full)
    assert build(student, tmp_path) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--steps", "0"), "steps"),
        (("--steps", "5"), "steps"),
        (("--first-steps", "-1"), "first-steps"),
        (("--block-frames", "0"), "block_frames"),
        (("--window-frames", "1"), "window"),
        (("--sink-frames", "6"), "sink"),
        (("--timestep-shift", "nan"), "shift"),
        (("--latent-size", "6x2"), "trained for 4x2"),
        (("--gpu", "sm89"), "--gpu"),
        (("--checkpoint", "/nowhere"), "/nowhere"),
        (("--out", "/dev/null"), "--out /dev/null: cannot be made"),
        (("--vae-precision", "fp16"), "--vae-precision is for --vae"),
        (("--frames", "5"), "--frames is for --dry-run"),
    ],
)
def test_mistakes_are_one_line(
    student: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert build(student, tmp_path, *words) == 1
    output = capsys.readouterr()
    assert told in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--steps", "one"),
        ("--precision", "fp12"),
        ("--target", "tpu"),
        ("--latent-size", "6"),
        ("--unknown",),
    ],
)
def test_usage_errors_are_one_line(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(list(words))
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o555)
    assert build(student, tmp_path) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_help_shows_examples() -> None:
    assert "python -m export.build --steps 1" in make_parser().format_help()


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.tensorrt.MODULES", ())


@pytest.mark.usefixtures("no_tensorrt", "no_export")
def test_tensorrt_absent(
    copy: Path, student: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        assert build(student, copy, target="auto") == 0
    assert "skipped asd_fp16.plan: TensorRT is not installed" in caplog.text
    assert not (copy / "asd_fp16.plan").exists()
    capsys.readouterr()
    assert build(student, copy, target="tensorrt") == 1
    error = capsys.readouterr().err
    assert "pip install 'asd-rt[rtx]'" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("no_export")
def test_a_builder_for_the_present_card_alone(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Plain tensorrt has no ComputeCapability: with a card it builds for that one, without it says so."""
    plain: Any = SimpleNamespace(__name__="tensorrt", __version__="11.0")

    def no_card() -> str:
        raise BackendError("no NVIDIA driver")

    monkeypatch.setattr("export.build.import_tensorrt", lambda: plain)
    monkeypatch.setattr("asd_rt.backends.cuda.present_gpu", no_card)
    assert build(student, tmp_path, target="tensorrt") == 1
    error = capsys.readouterr().err
    assert "tensorrt 11.0 builds for the present card only, and there is none" in error
    assert "pip install tensorrt-rtx" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    config = SimpleNamespace()
    _set_targets(plain, "denoiser", config, ("sm90",))
    assert not vars(config)


def test_relative_l2_of_infinite_values_is_infinite() -> None:
    assert parity.relative_l2(np.array([np.nan, 1.0]), np.ones(2)) == float("inf")
    assert parity.relative_l2(np.ones(2), np.ones(2)) == 0
