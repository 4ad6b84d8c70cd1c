"""The runtime needs numpy, safetensors, av and one backend: nothing of training, nothing of export."""

from __future__ import annotations

import os
import resource
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

PROMPT = "a red three moving right"
NOT_NEEDED = (
    *("torch", "train", "export", "onnx", "onnxscript", "scipy", "sklearn", "matplotlib"),
    *("PIL", "tqdm", "transformers", "tokenizers", "ftfy"),
)
COLD_START_CPU_S = (
    30.0  # of processors, which others' work does not lengthen as it does the clock's
)
TIMEOUT_S = 300


def children_cpu_s() -> float:
    """Processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def frame_count(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_runs_with_everything_else_unimportable(
    asd_rt: Callable[..., Any], engine: Path, out: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in NOT_NEEDED:
        (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is blocked')\n")
    words = ("--engine", engine, "--prompt", PROMPT, "--frames", "12", "--out", out / "a.mp4")
    made = asd_rt("run", *words, PYTHONPATH=str(blocked))
    assert made.code == 0, made.stderr
    assert frame_count(out / "a.mp4") == 12
    for command in (("inspect", engine), ("doctor",)):
        done = asd_rt(*command, cwd=engine.parent.parent, PYTHONPATH=str(blocked))
        assert done.code == 0, done


@pytest.mark.slow
def test_wheel_with_the_cpu_extra_alone(root: Path, tmp_path: Path) -> None:
    """A user's environment: the wheel and [cpu], the packaged engine, a cold start."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["-m", "pip", "install", "-q", "-c", str(root / "constraints.txt"), f"{root}[cpu]"]
    installed = subprocess.run(
        [str(python), *install], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert installed.returncode == 0, installed.stderr
    frozen = subprocess.run(
        [str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    )
    assert "torch" not in frozen.stdout
    command = [str(python.with_name("asd-rt")), "run", "--prompt", PROMPT, "--out", "x.mp4"]
    before = children_cpu_s()
    made = subprocess.run(
        command,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert made.returncode == 0, made.stderr
    assert frame_count(tmp_path / "x.mp4") == 48
    assert children_cpu_s() - before <= COLD_START_CPU_S
