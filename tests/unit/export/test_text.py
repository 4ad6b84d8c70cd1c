"""A text encoder beside an engine: added, kept, replaced alone, and never half."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import asd_rt
from asd_rt.cli import main as asd_rt_main
from asd_rt.errors import ConfigError, EngineError, PromptError
from asd_rt.manifest import from_json, read_manifest, verify, write_manifest
from asd_rt.text_encoder import TextEncoder
from export import text as text_module
from export.build import main
from export.bundle import carry_over, replace_parts
from export.engine import Target
from export.parity_report import report_files
from export.umt5 import Umt5Part
from export.umt5_source import open_umt5

ENGINE = "asd_fp32.onnx"


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def build(student: Path, out: Path, *words: str | Path) -> int:
    words = ("--checkpoint", student, "--target", "onnx", "--out", out, *words)
    return main([str(word) for word in words])


@pytest.fixture(scope="session")
def umt5(write_umt5: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_umt5(tmp_path_factory.mktemp("umt5") / "umt5", d_model=3)


@pytest.fixture(scope="session")
def with_text(
    student: Path, built: Path, umt5: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The engine of `built` with a text encoder, for reading only."""
    folder = tmp_path_factory.mktemp("with_text") / "engines"
    shutil.copytree(built, folder)
    assert build(student, folder, "--text-encoder", umt5) == 0
    return folder


@pytest.fixture
def copy(with_text: Path, tmp_path: Path) -> Path:
    shutil.copytree(with_text, tmp_path / "engines")
    return tmp_path / "engines"


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to export is a failure of the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("an export was begun")

    monkeypatch.setattr(text_module, "export_part", refuse)
    monkeypatch.setattr("export.engine.export_part", refuse)


def test_only_the_text_part_is_made(built: Path, with_text: Path) -> None:
    before, after = read_manifest(built / ENGINE), read_manifest(with_text / ENGINE)
    verify(with_text / ENGINE, after)
    mine = {"text", "text_weights", "tokenizer"}
    assert {n: p for n, p in after.parts.items() if n not in mine} == {
        n: p for n, p in before.parts.items() if n != "text"
    }
    assert after.tokenizer == {"kind": "umt5", "max_tokens": 4}  # as many as the denoiser takes
    assert after.sources["text"]["precision"] == "fp32"
    assert after.parity["text"]["relative_l2"] <= 1e-5
    assert after.parity["pass"] == before.parity["pass"]
    made = {part.file for part in after.parts.values()} | {f"{ENGINE}.json"}
    made |= {file.name for file in report_files(with_text / ENGINE)}
    assert {p.name for p in with_text.iterdir()} == made  # the vocabulary's part is gone
    for name in before.parts.keys() - {"text"}:
        file = before.parts[name].file
        assert (built / file).read_bytes() == (with_text / file).read_bytes()


def test_graph_follows_the_contract(with_text: Path) -> None:
    parts = read_manifest(with_text / ENGINE).parts
    model = onnx.load(with_text / parts["text"].file, load_external_data=False)
    onnx.checker.check_model(str(with_text / parts["text"].file))
    assert [value.name for value in model.graph.input] == ["tokens", "mask"]
    assert [value.name for value in model.graph.output] == ["context"]
    large = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {t.external_data[0].value for t in large} == {parts["text_weights"].file}
    assert len(large) == 22
    assert parts["text"].outputs["context"].shape == ("B", "L", 3)


def test_batch_and_mask(with_text: Path) -> None:
    """Padding changes nothing, and what lies behind a prompt is zero."""
    from asd_rt.text_encoder import open_text_session

    part = read_manifest(with_text / ENGINE).parts["text"]
    session = open_text_session(with_text / part.file, 1)
    tokens = np.array([[5, 9, 20, 1], [7, 1, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    (both,) = session.run(["context"], {"tokens": tokens, "mask": mask})
    (alone,) = session.run(["context"], {"tokens": tokens[1:, :2], "mask": mask[1:, :2]})
    assert not both[1, 2:].any()
    np.testing.assert_allclose(both[1:, :2], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(both[0]).min() > 0


@pytest.mark.usefixtures("no_export")
def test_up_to_date_part_is_left_alone(
    copy: Path, student: Path, umt5: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = files(copy)
    with caplog.at_level(logging.INFO):
        assert build(student, copy, "--text-encoder", umt5) == 0
        assert build(student, copy) == 0  # without the flag, what was added stays
    assert "its text encoder is up to date" in caplog.text
    assert files(copy) == before


def test_another_precision_replaces_the_text_part_alone(
    copy: Path, student: Path, umt5: Path
) -> None:
    before = files(copy)
    assert build(student, copy, "--text-encoder", umt5, "--text-precision", "int8") == 0
    after, manifest = files(copy), read_manifest(copy / ENGINE)
    verify(copy / ENGINE, manifest)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name.split("_")[0] for name in changed} == {"umt5", "asd"}
    assert {name for name in changed if name.startswith("asd")} == {f"{ENGINE}.json"}
    assert not any("tokenizer" in name for name in changed)
    assert sum(name.endswith(".weights") and "umt5" in name for name in after) == 1
    figures = manifest.parity["text"]
    assert figures["relative_l2"] <= 1e-5 < figures["storage"]


@pytest.mark.usefixtures("no_export")
def test_engines_of_a_folder_share_the_files(copy: Path, student: Path, umt5: Path) -> None:
    """A second engine without text gets the parts of the first; leaving them deletes nothing that is used."""
    manifest = read_manifest(copy / ENGINE)
    other = copy / "other.onnx"
    renamed = {
        name: part | {"file": "other.onnx"} if name == "denoiser" else part
        for name, part in manifest.to_json()["parts"].items()
        if name not in ("text", "text_weights", "tokenizer")
    }
    plain = from_json(manifest.to_json() | {"parts": renamed, "tokenizer": None, "sources": {}})
    shutil.copy(copy / ENGINE, other)
    write_manifest(other, plain)
    before = set(files(copy))
    text_module.add_text_encoder(open_umt5(umt5), None, [copy / ENGINE, other], force=False)
    assert set(files(copy)) == before
    assert read_manifest(other).parts["text"] == manifest.parts["text"]
    write_manifest(other, plain)  # once more, asked for alone
    text_module.add_text_encoder(open_umt5(umt5), None, [other], force=False)
    assert set(files(copy)) == before
    verify(other, read_manifest(other))
    told = {"name": "none", "sha256": "0", "parts": []}
    replace_parts(other, "text", told, {}, {}, copy, tokenizer=None)
    verify(copy / ENGINE, manifest)


def test_damaged_text_part_is_made_again(copy: Path, student: Path, umt5: Path) -> None:
    whole, manifest = files(copy), read_manifest(copy / ENGINE)
    name = manifest.parts["text_weights"].file
    (copy / name).write_bytes(bytes(len(whole[name])))
    with pytest.raises(EngineError, match="--text-encoder FOLDER"):
        verify(copy / ENGINE, manifest)
    assert build(student, copy, "--text-encoder", umt5) == 0
    assert files(copy) == whole  # the same source gives the same bytes


def test_rebuilt_engine_keeps_its_text_part(copy: Path, built: Path, student: Path) -> None:
    old, fresh = read_manifest(copy / ENGINE), read_manifest(built / ENGINE)
    without = {name: part for name, part in fresh.parts.items() if name != "text"}
    plain = fresh.__class__(**{**vars(fresh), "parts": without, "tokenizer": None})
    kept = carry_over(copy / ENGINE, plain)
    assert kept.parts == old.parts
    assert (kept.tokenizer, kept.sources) == (old.tokenizer, old.sources)
    assert kept.parity["text"] == old.parity["text"]
    # The checkpoint's own words come before what was added; so does another text_dim.
    assert carry_over(copy / ENGINE, fresh) == fresh
    wider = {**vars(plain), "model": plain.model.__class__(**{**vars(plain.model), "text_dim": 5})}
    assert carry_over(copy / ENGINE, fresh.__class__(**wider)).sources == {}
    # The whole command: this checkpoint brings words, so the text encoder and its files go.
    assert build(student, copy, "--force") == 0
    assert files(copy) == files(built)


def test_missed_parity_leaves_the_engine_as_it_was(
    copy: Path,
    student: Path,
    umt5: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = Umt5Part.forward

    def wrong(self: Any, tokens: Any, mask: Any, *stored: Any) -> Any:
        return forward(self, tokens, mask, *stored) * 1.01

    monkeypatch.setattr(Umt5Part, "forward", wrong)
    before = files(copy)
    assert build(student, copy, "--text-encoder", umt5, "--text-precision", "fp16") == 1
    assert "misses its parity budget: relative L2 1.0e-02 > 1e-03" in capsys.readouterr().err
    assert files(copy) == before


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--text-encoder", "/nowhere"), "--text-encoder /nowhere: no such folder"),
        (("--text-precision", "int8"), "--text-precision is for --text-encoder"),
        (("--text-encoder", "{wide}"), "gives 16 numbers a token, the denoiser reads 3 (text_dim)"),
        (("--text-encoder", "{student}"), "type None, expected 'umt5'"),
    ],
)
def test_mistakes_are_one_line(
    student: Path,
    write_umt5: Any,
    tmp_path: Path,
    words: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide, out = write_umt5(tmp_path / "wide"), tmp_path / "out"
    out.mkdir()
    assert build(student, out, *(w.format(wide=wide, student=student) for w in words)) == 1
    output = capsys.readouterr()
    assert told in output.err
    assert output.err.count("\n") == 1
    assert os.listdir(out) == []


@pytest.mark.usefixtures("no_export")
def test_want_of_memory_for_a_plan_is_said_before_anything_is_built(
    student: Path,
    umt5: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    targets = [Target("onnx", "fp32"), Target("tensorrt_rtx", "fp16", ("sm89",))]
    monkeypatch.setattr("export.build.choose_targets", lambda *_: targets)
    monkeypatch.setattr(text_module, "available_memory_bytes", lambda: 100)
    assert build(student, tmp_path, "--text-encoder", umt5) == 1
    error = capsys.readouterr().err
    assert "billion weights takes about" in error and "--text-target onnx" in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []

    source, plans = open_umt5(umt5), [tmp_path / "asd_fp16.plan"]
    monkeypatch.setattr(text_module, "is_added", lambda *_: True)
    text_module.check_text_memory(source, None, plans, force=False)  # nothing to compile
    with pytest.raises(ConfigError, match="billion weights"):
        text_module.check_text_memory(source, None, plans, force=True)


class TestRuntime:
    """The text part seen from asd_rt: opened late, remembered, released."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cache").mkdir()
        monkeypatch.setenv("ASD_RT_CACHE", str(tmp_path / "cache"))

    def test_session_reads_any_prompt(self, with_text: Path) -> None:
        with asd_rt.open(with_text / ENGINE, threads=1) as session:
            context = session.context("一只猫 🎈 &amp; a cat")
            assert context.shape == (1, 4, 3)
            assert session.context("").shape == (1, 1, 3)
            blocks = list(session.generate("a cat", frames=4))
        assert [block.frames.shape for block in blocks] == [(2, 16, 8, 3)] * 2

    def test_engine_opens_and_runs_without_the_files(self, copy: Path) -> None:
        for path in copy.glob("umt5_*"):
            path.unlink()
        with asd_rt.open(copy / ENGINE, threads=1) as session:
            context = np.ones((1, 2, 3), np.float32)
            assert len(list(session.generate_from(context, frames=2))) == 1
            with pytest.raises(EngineError, match="--prompt-embeds FILE"):
                session.context("a cat")

    @pytest.mark.parametrize("part", ["text", "text_weights", "tokenizer"])
    def test_damage_shows_at_the_first_prompt(self, copy: Path, part: str) -> None:
        path = copy / read_manifest(copy / ENGINE).parts[part].file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with (
            asd_rt.open(copy / ENGINE, threads=1) as session,
            pytest.raises(EngineError, match=f"damaged {part} part.*--text-encoder"),
        ):
            session.context("a cat")

    def test_repeated_prompt_needs_no_encoder(self, copy: Path) -> None:
        manifest = read_manifest(copy / ENGINE)
        first = TextEncoder(copy / ENGINE, manifest).encode("a  cat &amp; ")
        (copy / manifest.parts["text_weights"].file).write_bytes(b"")
        again = TextEncoder(copy / ENGINE, manifest)
        np.testing.assert_array_equal(again.encode("a cat &"), first)
        with pytest.raises(EngineError, match="damaged text_weights part"):
            again.encode("a dog")

    @pytest.mark.parametrize("keep", [None, True, False])
    def test_is_released_where_it_is_large(
        self, with_text: Path, monkeypatch: pytest.MonkeyPatch, keep: bool | None
    ) -> None:
        manifest = read_manifest(with_text / ENGINE)
        monkeypatch.setattr("asd_rt.text_encoder.RELEASE_BYTES", 1000)
        checked: list[str] = []
        monkeypatch.setattr(
            "asd_rt.text_encoder.check_part", lambda path, manifest, part: checked.append(part)
        )
        encoder = TextEncoder(with_text / ENGINE, manifest, keep=keep)
        results = [encoder.encode(prompt) for prompt in ("a cat", "a dog")]
        assert (encoder._session is not None) is bool(keep)
        assert not np.array_equal(results[0], results[1])
        encoder.release()
        assert encoder.encode("the grass").shape[2] == 3
        # Gigabytes are read to check them once, not whenever they are loaded again.
        assert sorted(checked) == ["text", "text_weights", "tokenizer"]

    def test_a_card_that_would_not_be_used_is_refused(
        self, with_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "one.safetensors"
        flags = ["--prompt", "a cat", "--out", str(out), "--device", "cuda"]
        assert asd_rt_main(["encode", "--engine", str(with_text / ENGINE), *flags]) == 1
        assert "which runs on the CPU; leave it out" in capsys.readouterr().err
        assert not out.exists()

    def test_engine_without_text_names_both_ways_out(self, copy: Path) -> None:
        document = read_manifest(copy / ENGINE).to_json()
        for name in ("text", "text_weights", "tokenizer"):
            del document["parts"][name]
        write_manifest(copy / ENGINE, from_json(document | {"tokenizer": None, "sources": {}}))
        with (
            asd_rt.open(copy / ENGINE, threads=1) as session,
            pytest.raises(PromptError, match=r"--text-encoder FOLDER, or .* --prompt-embeds FILE"),
        ):
            session.context("a cat")
