"""Runs of real networks: from videos to a student, one step at the width of 1.3B, and what can go wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.unit.train.real_toy import (
    FRAMES,
    PROMPTS,
    SHAPE,
    write_config,
    write_inputs,
    write_network,
    write_prompts,
)
from tests.unit.train.test_clips import write_video
from tests.unit.train.test_sharded import files_of_at_most
from train.__main__ import main
from train.checkpoint import load_checkpoint
from train.checkpoint_command import main as checkpoint_command
from train.clips import main as make_clips
from train.sharded import folders, read_mark
from train.vae import WanVae
from train.vae_config import WanVaeConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


def run(config: Path, out: Path, *flags: str) -> int:
    return main(["--config", str(config), "--out", str(out), "--threads", "1", *flags])


def only_distill(folder: Path, **changes: Any) -> Path:
    return write_config(folder, leave_out=("teacher", "init"), **changes)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error that was told."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


def test_from_videos_to_a_student(tmp_path: Path) -> None:
    """Real files through a small VAE; the teacher and the causal start train on what it makes of them."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(3):
        write_video(videos / f"{i}.mp4", 30 + i)
    write_video(videos / "short.mp4", 8)
    (videos / "broken.mp4").write_bytes(b"no video")
    (videos / "broken.txt").write_text("a caption")
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4))
    draw = torch.Generator().manual_seed(0)
    shapes = vae.stored_shapes()
    stored = {k: 0.2 * torch.randn(shape, generator=draw) for k, shape in shapes.items()}
    save_file(stored, tmp_path / "vae.safetensors")
    flags = ["--videos", videos, "--vae", tmp_path / "vae.safetensors", "--out", tmp_path / "clips"]
    assert make_clips([*map(str, flags), "--size", "32x32", "--frames", "25"]) == 0
    listed = json.loads((tmp_path / "clips" / "clips.json").read_text())
    assert set(listed["rejected"]) == {"short.mp4", "broken.mp4"}

    write_network(tmp_path / "teacher", 1, in_dim=16, out_dim=16)
    write_network(tmp_path / "student", 2, in_dim=16, out_dim=16)
    prompts = [f"caption of {i}" for i in range(3)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    write_prompts(tmp_path / "prompts.safetensors", prompts, 3)
    write_prompts(tmp_path / "negative.safetensors", ["bad"], 4)
    config = write_config(tmp_path, model={"in_dim": 16, "out_dim": 16})
    assert run(config, tmp_path / "out") == 0
    lines = (tmp_path / "out" / "curve.jsonl").read_text().splitlines()
    losses = {r["stage"]: r["loss"] for r in map(json.loads, lines)}
    assert set(losses) == {"teacher", "init", "distill"}
    assert all(math.isfinite(loss) for loss in losses.values())
    student = load_checkpoint(tmp_path / "out" / "student")
    assert student.deployment.latent_hw == (4, 4)
    start = load_checkpoint(tmp_path / "student").weights
    assert any(not torch.equal(student.weights[k], start[k]) for k in start)


def test_one_step_at_the_width_of_1_3b(tmp_path: Path) -> None:
    """Every part at real width and one layer: rollout, DMD, ASD, critic, EMA, save, resume."""
    weights = tmp_path / "network"
    command = ["random", "--config", "wan_1_3b", "--layers", "1", "--format", "official"]
    assert checkpoint_command([*command, "--out", str(weights)]) == 0
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    write_prompts(tmp_path / "prompts.safetensors", PROMPTS, 3, text_dim=4096)
    write_prompts(tmp_path / "negative.safetensors", ["bad"], 4, text_dim=4096)
    wan = {
        "dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096, "text_len": 512, "in_dim": 16,
        "out_dim": 16, "num_heads": 12, "num_layers": 1,
    }  # fmt: skip
    distill = {"steps": 2, "critic_updates": 1, "step_weights": [1, 0, 0, 0], "student_lr": 2e-6}
    distill |= {"first_steps_share": 0.0}
    config = only_distill(
        tmp_path,
        model=wan,
        weights={"teacher": str(weights), "student": str(weights)},
        data={"clips": ""},
        distill=distill,
        parallel={"micro_batches": 1, "checkpoint_activations": True},
    )
    out, seed = tmp_path / "out", ["--seed", "1"]
    assert run(config, out, *seed) == 0
    first = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert {"loss", "grad_norm", "disc", "critic"} <= set(first[0])
    assert first[0]["grad_norm"] > 0
    assert first[1]["push"] > 0, "ASD must push in the step that is resumed"
    start = load_checkpoint(weights).weights["blocks.0.ffn.0.weight"].float()
    student = load_checkpoint(out / "student").weights["blocks.0.ffn.0.weight"]
    assert 0 < (student - start).abs().max() < 1e-4
    shutil.rmtree(out / "distill" / "step_00000002")
    assert run(config, out, *seed, "--resume") == 0
    again = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    for key in ("loss", "grad_norm", "disc", "critic"):
        assert [r[key] for r in again] == [r[key] for r in first]


def test_activation_checkpoints_change_nothing(folder: Path) -> None:
    for name in ("plain", "checkpointed"):
        parallel = {"checkpoint_activations": name == "checkpointed", "save_minutes": 10.0}
        distill = {"steps": 4, "step_weights": [1, 0, 0, 0], "asd_ratio": 5.0}
        config = only_distill(folder, parallel=parallel, distill=distill)
        assert run(config, folder / name, "--seed", "3") == 0
    curves = [
        [json.loads(line) for line in (folder / name / "curve.jsonl").read_text().splitlines()]
        for name in ("plain", "checkpointed")
    ]
    for one, other in zip(*curves, strict=True):
        for key in ("loss", "grad_norm", "critic", "disc", "push"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)
    assert curves[0][2]["push"] > 0.5, "ASD must push"


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = only_distill(folder, distill={"steps": 50, "student_lr": 1e30})
    assert run(config, folder / "out") == 1
    said = error_line(capsys)
    assert "a figure is not finite" in said
    (*_, last) = folders(folder / "out" / "distill")
    assert str(last) in said
    assert read_mark(last)["step"] < 50
    # What the line says to do helps.
    config = only_distill(folder, distill={"steps": 2})
    assert run(config, folder / "out", "--resume") == 1
    place = folder / "out" / "distill"
    assert f"remove {place}" in said and f"remove {place}" in error_line(capsys)
    shutil.rmtree(place)
    assert run(config, folder / "out", "--resume") == 0
    curve = (folder / "out" / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in curve] == [0, 1]


def test_gradients_that_are_not_finite_are_told_before_their_step_is_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The discriminator's penalty is no figure, its gradient's norm is."""
    monkeypatch.setattr(
        "train.distill.shake_penalty", lambda logits, *_: logits[0].sum() * math.nan
    )
    config = only_distill(folder, distill={"step_weights": [1, 0, 0, 0]})
    assert run(config, folder / "out") == 1
    said = error_line(capsys)
    assert "distill step 0: a figure is not finite" in said and "'disc_norm': nan" in said
    assert not folders(folder / "out" / "distill")


def test_the_causal_start_is_of_one_timestep_shift(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(folder, leave_out=("teacher",))
    assert run(config, folder / "out", "--stages", "init") == 0
    changed = ["--set", "timestep_shift=3.0"]
    assert run(config, folder / "out", "--stages", "init", "--resume", *changed) == 1
    assert "made with another configuration or seed" in error_line(capsys)


def test_a_disk_that_is_full_while_saving(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = only_distill(folder)
    assert run(config, folder / "out") == 0
    whole = folders(folder / "out" / "distill")
    shutil.rmtree(whole[-1])
    capsys.readouterr()
    with files_of_at_most(100_000):
        assert run(config, folder / "out", "--resume") == 1
    said = error_line(capsys)
    assert "step_00000004: cannot be saved" in said
    assert "is the disk full?" in said or "File too large" in said  # whoever notices it first
    assert f"{whole[0]} is intact" in said
    assert folders(folder / "out" / "distill") == whole[:1]
    assert run(config, folder / "out", "--resume") == 0


def test_a_run_is_gone_on_with_only_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(only_distill(folder), folder / "out") == 0
    capsys.readouterr()
    written = load_checkpoint(folder / "out" / "student").weights
    assert run(only_distill(folder), folder / "out", "--resume") == 0  # nothing is left to do
    again = load_checkpoint(folder / "out" / "student").weights
    assert all(torch.equal(again[name], value) for name, value in written.items())
    capsys.readouterr()
    assert run(only_distill(folder), folder / "out") == 1
    assert "already holds a run; go on with it by --resume" in error_line(capsys)
    assert run(only_distill(folder, distill={"guidance": 3.0}), folder / "out", "--resume") == 1
    assert "made with another configuration or seed" in error_line(capsys)
    assert run(only_distill(folder), folder / "out", "--resume", "--seed", "1") == 1
    assert "made with another configuration or seed" in error_line(capsys)
    last = folders(folder / "out" / "distill")[-1]
    for file in last.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:50])
    assert run(only_distill(folder), folder / "out", "--resume") == 1
    assert "is no whole checkpoint" in error_line(capsys)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: (f / "prompts.txt").write_text("\n"), "data.prompts .*holds no prompt"),
        (
            lambda f: (f / "prompts.txt").write_text("prompt 1\nanother"),
            "holds no embedding of 1 of 2 lines of .*prompts.txt, the first is 'another'",
        ),
        (
            lambda f: write_prompts(f / "prompts.safetensors", PROMPTS, 3, text_dim=16),
            "data.embeddings .*of 16 numbers, the network takes at most 5 of 8",
        ),
        (
            lambda f: (f / "clips" / "clips-00000.safetensors").write_bytes(b"x"),
            "clips-00000.safetensors: cannot be read",
        ),
        (
            lambda f: (f / "clips" / "clips.json").write_text(
                (f / "clips" / "clips.json").read_text().replace("prompt 2", "what?")
            ),
            "holds no embedding of 1 of 5 captions of .*clips, the first is 'what\\?'",
        ),
        (
            lambda f: (shutil.rmtree(f / "teacher"), write_network(f / "teacher", 1, dim=48)),
            "weights.teacher .*is a network of another shape: dim 48 \\(expected 32\\)",
        ),
        (lambda f: shutil.rmtree(f / "student"), "student: no such folder or file"),
    ],
)
def test_broken_inputs_are_one_line_before_the_first_step(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Any, told: str
) -> None:
    import re

    change(folder)
    assert run(write_config(folder), folder / "out") == 1
    said = error_line(capsys)
    assert re.search(told, said), said
    assert not (folder / "out").exists()


def test_a_larger_teacher_needs_a_critic_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network(folder / "large", 7, dim=64, num_layers=3)
    shape = SHAPE | {"dim": 64, "num_layers": 3}
    weights = {"teacher": str(folder / "large")}
    config = only_distill(folder, teacher_model=shape, weights=weights)
    assert run(config, folder / "out") == 1
    assert "missing weights.critic" in error_line(capsys)
    weights["critic"] = str(folder / "student")
    config = only_distill(folder, teacher_model=shape, weights=weights)
    assert run(config, folder / "out") == 0
    assert load_checkpoint(folder / "out" / "student").config.dim == 32


def test_prompts_follow_one_another_whatever_the_processes(folder: Path) -> None:
    """Every prompt once an epoch, the same ones for a micro-batch whoever computes it."""
    from train.clip_data import ClipData
    from train.config import load_config
    from train.distill_task import draw_step

    config = load_config(only_distill(folder))
    data = ClipData(config, 0)
    found = []
    for index in range(3):
        whole, shares = draw_step(config, data, 0, "distill", index, range(2))
        part, late = draw_step(config, data, 0, "distill", index, range(1, 2))
        assert part == whole
        np.testing.assert_array_equal(late[0].contexts.rollout, shares[1].contexts.rollout)
        assert torch.equal(
            late[0].noise((3,), torch.device("cpu")), shares[1].noise((3,), torch.device("cpu"))
        )
        found += [share.contexts.rollout for share in shares]
    table = data.table.contexts(range(len(PROMPTS)))
    rows = [int((table - context).abs().amax(dim=(1, 2)).argmin()) for context in found]
    assert sorted(rows) == list(range(len(PROMPTS)))
    assert config.clip_frames == FRAMES
