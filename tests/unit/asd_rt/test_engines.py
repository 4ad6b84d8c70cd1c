"""Which engine is taken when none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_rt import engines
from asd_rt.errors import EngineError


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(engines, "PACKAGED_DIR", tmp_path / "packaged")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
        (folder / f"{name}.json").touch()


@pytest.mark.parametrize(("gpu", "best"), [(False, "asd_fp32.onnx"), (True, "asd_fp16.plan")])
def test_the_best_for_the_machine(place, monkeypatch, gpu, best) -> None:
    monkeypatch.setattr(engines, "has_nvidia_driver", lambda: gpu)
    put(place / "engines", "asd_fp32.onnx", "asd_fp16.onnx", "asd_fp16.plan", "asd_fp32.plan")
    assert engines.best_engine() == Path("engines") / best


def test_built_before_packaged(place) -> None:
    put(place / "packaged", "asd_fp32.onnx")
    assert engines.best_engine() == place / "packaged" / "asd_fp32.onnx"
    put(place / "engines", "mine_fp32.onnx")
    assert engines.best_engine() == Path("engines/mine_fp32.onnx")


def test_a_plan_is_of_no_use_without_a_driver(place, monkeypatch) -> None:
    monkeypatch.setattr(engines, "has_nvidia_driver", lambda: False)
    put(place / "engines", "asd_fp16.plan")
    with pytest.raises(EngineError, match="build one with: python -m export"):
        engines.best_engine()


def test_parts_are_not_engines(place) -> None:
    put(place / "engines", "asd_fp32.onnx")
    (place / "engines" / "asd_fp32.time.onnx").touch()
    (place / "engines" / "report.json").touch()
    assert engines.list_engines(place / "engines") == [place / "engines" / "asd_fp32.onnx"]
    assert engines.list_engines(place / "nowhere") == []
