"""How fast a plan is beside the one that it would replace: measured where its card is, else left out."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from asd_rt.backends import cuda
from asd_rt.config import CacheConfig
from asd_rt.manifest import Manifest, sha256_file, write_manifest
from export.speed import measure_speed
from tests.unit.asd_rt.conftest import build_toy
from tests.unit.asd_rt.fake_card import PASSES, FakeCuda, FakeTrt, as_plan


def toy_plan(folder: Path, precision: str) -> tuple[Path, Manifest]:
    """A toy engine as a plan of some precision, for a fake card."""
    folder.mkdir()
    toy = build_toy(folder, CacheConfig(block_frames=2, window_frames=6))
    path = folder / f"asd_{precision}.plan"
    shutil.move(toy.path, path)
    part = replace(toy.manifest.parts["denoiser"], file=path.name, sha256=sha256_file(path))
    parts = {**toy.manifest.parts, "denoiser": part}
    manifest = as_plan(toy.manifest, precision=precision, parts=parts)
    write_manifest(path, manifest)
    return path, manifest


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    runtime = FakeCuda()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTrt("tensorrt_rtx", runtime))
    monkeypatch.setattr("asd_rt.backends.tensorrt.import_cuda", lambda: runtime)
    monkeypatch.setattr(cuda, "import_cuda", lambda: runtime)
    return runtime


def test_plans_take_turns_on_their_card(tmp_path: Path, card: FakeCuda) -> None:
    other, _ = toy_plan(tmp_path / "engines", "fp16")
    found = measure_speed(*toy_plan(tmp_path / "scratch", "int8"), other.parent)
    assert found is not None and found["against"] == "asd_fp16.plan"
    assert found["times_as_long"] == pytest.approx(
        found["ms_a_pass"] / found["its_ms_a_pass"], rel=0.05
    )
    assert [call for call in card.calls if call[0] == "launch" and call[1] == PASSES]
    assert card.nothing_is_left()


def test_without_a_card_it_is_said_and_left_out(
    tmp_path: Path, card: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    card.cards = 0
    other, _ = toy_plan(tmp_path / "engines", "fp16")
    caplog.set_level(logging.INFO, "export.speed")
    assert measure_speed(*toy_plan(tmp_path / "scratch", "fp8"), other.parent) is None
    assert "not compared: no usable NVIDIA card" in caplog.text


def test_the_best_precision_replaces_none(tmp_path: Path, card: FakeCuda) -> None:
    other, _ = toy_plan(tmp_path / "engines", "bf16")
    assert measure_speed(*toy_plan(tmp_path / "scratch", "fp16"), other.parent) is None
    assert not card.calls
