"""The latency report, from given records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asd_rt.timing import describe_machine, summarise, versions
from benchmarks.latency import main, markdown, write_report


@pytest.fixture
def report() -> dict[str, Any]:
    records = [
        {
            "block": block,
            "steps": 4 if block == 0 else 1,
            "denoise_ms": 8.0 if block == 0 else 2.0,
            "cache_ms": None if block == 3 else 2.0,
            "decode_ms": 1.0,
            "block_ms": (8.0 if block == 0 else 2.0) + (0.0 if block == 3 else 2.0) + 1.0,
            "frames": 3,
        }
        for _ in range(2)
        for block in range(4)
    ]
    return {
        "format_version": 1,
        "name": "asd_fp32",
        "fps": 16,
        "command": "python -m benchmarks.latency",
        "engine": "engines/asd_fp32.onnx",
        "sha256": "ab" * 32,
        "precision": "fp32",
        "device": "CPU, 2 threads",
        "machine": describe_machine(),
        "versions": versions(),
        "plan": {"steps": 1, "first_steps": 4},
        "blocks": 4,
        "block_frames": 3,
        "warmup": 1,
        "repeats": 2,
        "summary": summarise(records),
        "records": records,
    }


def test_report_is_written_whole(report: dict[str, Any], tmp_path: Path) -> None:
    paths = write_report(report, tmp_path)
    assert [path.name for path in paths] == ["latency.json", "latency.md", "latency.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert json.loads(paths[0].read_text()) == report
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_markdown_names_engine_machine_and_command(report: dict[str, Any]) -> None:
    text = markdown(report)
    for words in (
        "4 steps for the first block, 1 for later ones",
        "sha256 " + "ab" * 32,
        report["machine"]["cpu"],
        "`python -m benchmarks.latency`",
        "| time to first frame | 9.00 |",
        "| sustained | 600.0 | 750.0 |",
    ):
        assert words in text


def test_one_block_can_be_drawn(report: dict[str, Any], tmp_path: Path) -> None:
    report["records"] = report["records"][:1]
    report["summary"] = summarise(report["records"])
    write_report(report, tmp_path)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 1
    assert "cannot be made" in capsys.readouterr().err
    for words in (["--blocks", "0"], ["--repeats", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
