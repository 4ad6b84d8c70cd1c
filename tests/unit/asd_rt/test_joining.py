"""Whether to join passes: measured once, remembered by engine and device, never in the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asd_rt import joining
from asd_rt.files import cache_folder
from asd_rt.manifest import Part

SHAPE = (1, 12, 2, 4, 2)


class Engine:
    """A toy engine that can join, or cannot."""

    def __init__(self, toy: Any, network: Any, device: str = "cpu") -> None:
        parts = toy.manifest.parts | {"joined": Part("joined.onnx", "1" * 64, 1)}
        self.manifest = replace(toy.manifest, parts=parts)
        self.denoiser, self.device = network, device


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASD_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_both_ways_are_measured_over_a_full_window(toy, network) -> None:
    separate, joined = joining.measure(network, toy.manifest, SHAPE)
    assert separate > 0
    assert joined > 0
    # Window 6, blocks of 2: 4 past frames, of which the oldest block leaves.
    assert {(t, past) for t, _, past in network.calls} == {(0.0, 4), (1000.0, 4)}
    assert {past for _, _, past, _ in network.joined_calls} == {4}
    assert network.joined_calls[0][3] == [0, 1]


@pytest.mark.parametrize(("seconds", "answer"), [((2.0, 1.0), True), ((1.0, 1.0), False)])
def test_the_answer_is_remembered(toy, network, monkeypatch, folder, seconds, answer) -> None:
    measured = []
    monkeypatch.setattr(joining, "measure", lambda *a: measured.append(a) or seconds)
    engine = Engine(toy, network)
    assert joining.joining_is_faster(engine, SHAPE) is answer
    assert joining.joining_is_faster(Engine(toy, network), SHAPE) is answer
    assert len(measured) == 1
    joining.joining_is_faster(Engine(toy, network, "another"), SHAPE)
    joining.joining_is_faster(engine, (2, *SHAPE[1:]))
    assert len(measured) == 3
    (file,) = folder.iterdir()
    file.write_text("{ not json")
    assert joining.joining_is_faster(engine, SHAPE) is answer
    assert len(measured) == 4


def test_without_a_place_to_remember(toy, network, monkeypatch) -> None:
    monkeypatch.setattr(joining, "cache_folder", lambda: None)
    monkeypatch.setattr(joining, "measure", lambda *a: pytest.fail("measured"))
    assert not joining.joining_is_faster(Engine(toy, network), SHAPE)


def test_an_answer_that_cannot_be_kept_is_not_taken(toy, network, monkeypatch, caplog) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(joining, "measure", lambda *a: (2.0, 1.0))
    monkeypatch.setattr("os.replace", full)
    assert not joining.joining_is_faster(Engine(toy, network), SHAPE)
    assert "No space left" in caplog.text


def test_an_engine_that_cannot_join_is_not_measured(toy, network, monkeypatch) -> None:
    monkeypatch.setattr(network, "can_join", False)
    monkeypatch.setattr(joining, "measure", lambda *a: pytest.fail("measured"))
    assert not joining.joining_is_faster(Engine(toy, network), SHAPE)


def test_the_cache_folder(folder, monkeypatch, tmp_path) -> None:
    assert cache_folder() == folder
    assert folder.is_dir()
    monkeypatch.delenv("ASD_RT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / "asd-rt"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASD_RT_CACHE", str(tmp_path / "file" / "below"))
    assert cache_folder() is None
