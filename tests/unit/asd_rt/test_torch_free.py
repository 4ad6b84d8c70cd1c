"""The runtime runs where torch, onnx, train and export cannot be imported, and imports in no time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxscript", "train", "export", "sklearn"}:
            raise ImportError(f"{name} is walled off")

sys.meta_path.insert(0, Wall())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("the wall does not hold")

import asd_rt
from asd_rt.cli import main

with asd_rt.open(sys.argv[1]) as session:
    print([(b.steps, b.frames.shape) for b in session.generate("a red three moving right", frames=4)])
arguments = ["--engine", sys.argv[1], "--out", sys.argv[2], "--prompt", "red", "--frames", "2"]
raise SystemExit(main(["run", *arguments]))
"""


def test_runs_without_torch(toy, tmp_path) -> None:
    out = tmp_path / "x.gif"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(toy.path), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[(4, (2, 4, 2, 3)), (1, (2, 4, 2, 3))]")
    assert out.stat().st_size > 0


def test_importing_loads_nothing_heavy() -> None:
    program = "import sys, asd_rt; print(*{'numpy', 'av', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
