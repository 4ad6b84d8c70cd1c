"""kill -9 at any moment, then --resume: the command ends with the very same curve and the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.train.toy import toy_toml
from train.curves import CURVE, read_curve
from train.stage import load_torch

STAGES = ("teacher", "init", "distill")
STEPS = {"teacher": 90, "init": 20, "distill": 90}
AFTER = 50  # steps that must follow a kill


def begin(root: Path, toml: Path, out: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "train", "--config", str(toml), "--out", str(out)]
    command += ["--stages", ",".join(STAGES), "--save-every", "0", "--threads", "1", *flags]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told.decode()


def kill_in(process: subprocess.Popen[bytes], out: Path, stage: str, steps: int) -> int:
    """Kill when `stage` has done about `steps` steps; returns those in its checkpoint."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(curve(out).get(stage, {})) >= steps:
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return int(load_torch(out / f"{stage}.pt")["step"])


def curve(out: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Stage -> step -> its figures, without what time they took."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for record in read_curve(out / CURVE):
        figures = {k: v for k, v in record.items() if k not in ("stage", "step", "seconds")}
        steps = found.setdefault(record["stage"], {})
        assert record["step"] not in steps, record
        steps[record["step"]] = figures
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints' contents are bit for bit the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.long
def test_a_killed_run_goes_on_as_if_nothing_had_been(root: Path, tmp_path: Path) -> None:
    """Longer than most tests: four processes, each of which imports torch, and 400 steps."""
    toml = toy_toml(tmp_path, **STEPS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(begin(root, toml, whole))
    kept = kill_in(begin(root, toml, killed), killed, "teacher", 7)
    assert 0 < kept <= STEPS["teacher"] - AFTER
    kept = kill_in(begin(root, toml, killed, "--resume"), killed, "distill", 11)
    assert 0 < kept <= STEPS["distill"] - AFTER
    finish(begin(root, toml, killed, "--resume"))
    expected, found = curve(whole), curve(killed)
    for stage in STAGES:
        assert list(expected[stage]) == list(range(STEPS[stage]))
        assert found[stage] == expected[stage]
        one, other = load_torch(whole / f"{stage}.pt"), load_torch(killed / f"{stage}.pt")
        assert same(one, other), stage
    for stage in ("teacher", "init"):
        files = [out / stage / "model.safetensors" for out in (whole, killed)]
        assert files[0].read_bytes() == files[1].read_bytes()
