"""The engine inside the package is what the shipped checkpoint exports to, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_rt.manifest import read_manifest, verify
from export.build import main

MEND = "python -m export.build --steps 1 --target onnx --out asd_rt/engine --force"


def test_packaged_engine_is_current(root: Path, tmp_path: Path) -> None:
    packaged = root / "asd_rt" / "engine" / "asd_fp32.onnx"
    assert packaged.is_file(), f"no packaged engine; make it: {MEND}"
    shipped = read_manifest(packaged)
    verify(packaged, shipped)
    assert main(["--steps", "1", "--target", "onnx", "--out", str(tmp_path)]) == 0
    found = read_manifest(tmp_path / "asd_fp32.onnx")
    if found.tools != shipped.tools:
        pytest.skip(f"built with other tools: {shipped.tools}, here {found.tools}")
    assert found.parts == shipped.parts, f"the checkpoint or the exporter changed: {MEND}"
    assert found.checkpoint == shipped.checkpoint
    unmeasured = [{k: v for k, v in m.to_json().items() if k != "parity"} for m in (found, shipped)]
    assert unmeasured[0] == unmeasured[1]
