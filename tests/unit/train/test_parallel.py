"""Several processes train as one does, and take up each other's checkpoints: real torchrun, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asd_rt.errors import ConfigError
from tests.unit.train.real_toy import write_config, write_inputs
from train.__main__ import main
from train.parallel import Parallel, check_ranks
from train.real_config import ParallelConfig

ROOT = Path(__file__).parents[3]
STEPS = 6  # of the distillation
Curve = list[dict[str, float]]


def curve(out: Path) -> Curve:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def alone(config: Path, out: Path, *flags: str) -> Curve:
    assert main(["--config", str(config), "--out", str(out), "--threads", "1", *flags]) == 0
    return curve(out)


def together(config: Path, out: Path, *flags: str) -> Curve:
    """Two processes under torchrun, which finds itself a free port."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "train", "--config", str(config), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return curve(out)


def assert_equal(found: Curve, expected: Curve, tolerance: float = 1e-4) -> None:
    assert [(r["stage"], r["step"]) for r in found] == [(r["stage"], r["step"]) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in set(theirs) - {"stage", "step", "seconds"}:
            close = pytest.approx(theirs[name], abs=tolerance, rel=tolerance)
            assert ours[name] == close, (theirs["stage"], theirs["step"], name)


def without_last(run: Path, copy: Path) -> Path:
    """A copy of a run as it was one step before its end."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "distill" / f"step_{STEPS:08d}")
    shutil.rmtree(copy / "student")
    assert (copy / "distill" / f"step_{STEPS - 1:08d}").is_dir()
    return copy


def test_two_processes_train_as_one_and_take_up_each_others_checkpoints(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    # Two micro-batches a process, so that pulls and pushes are summed apart, as in a real run.
    config = write_config(
        tmp_path,
        parallel={"micro_batches": 4, "checkpoint_activations": True},
        distill={
            "steps": STEPS, "step_weights": [0.8, 0, 0, 0.2], "first_steps_share": 0.0, "asd_ratio": 5.0,
        },
    )  # fmt: skip
    seed = ["--seed", "1"]  # whose discriminator tells clips apart from its second step on
    one = alone(config, tmp_path / "one", *seed)
    assert [r["stage"] for r in one] == ["teacher"] * 2 + ["init"] * 2 + ["distill"] * STEPS
    assert [r.get("push", 0) > 0 for r in one[-6:]] == [False] * 4 + [True] * 2, "ASD must push"
    assert one[-1]["push"] > 0.5
    two = together(config, tmp_path / "two", *seed)
    assert_equal(two, one)

    # Of two, gone on with by one; and the other way round.
    seed.append("--resume")
    assert_equal(alone(config, without_last(tmp_path / "two", tmp_path / "a"), *seed), one)
    assert_equal(together(config, without_last(tmp_path / "one", tmp_path / "b"), *seed), one)
    expected = load_file(tmp_path / "one" / "student" / "model.safetensors")
    for run in ("two", "a", "b"):
        found = load_file(tmp_path / run / "student" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


def test_micro_batches_are_shared_evenly_and_in_order() -> None:
    settings = ParallelConfig(micro_batches=6)
    shares = [list(Parallel(settings, rank=rank, ranks=3).shares) for rank in range(3)]
    assert shares == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ConfigError, match="micro_batches 6 cannot be shared evenly by 4"):
        check_ranks(settings, 4)


def test_the_tiny_world_is_not_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    config = ROOT / "train" / "configs" / "tiny.toml"
    assert main(["--config", str(config), "--out", str(tmp_path / "out")]) == 1
    assert "trains in one process" in capsys.readouterr().err
