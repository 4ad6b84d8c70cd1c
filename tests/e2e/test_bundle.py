"""A network, a text encoder and a video decoder in Wan's formats: a prompt in, an mp4 out, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers", reason="diffusers writes the video decoder here")

pytestmark = pytest.mark.slow

Run = Callable[..., Any]
NOT_NEEDED = ("torch", "train", "export", "onnx", "onnxscript", "transformers", "diffusers")


def write_vae(folder: Path) -> Path:
    """A random AutoencoderKLWan with 8 channels where the real one has 96, and half as deep to save time."""
    import torch

    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1).save_pretrained(folder)
    return folder


def test_from_three_checkpoints_to_a_video(
    asd_rt: Run, module: Run, write_umt5: Callable[..., Path], tmp_path: Path
) -> None:
    student, out = tmp_path / "student", tmp_path / "engines"
    out.mkdir()
    words = ("--config", "small", "--format", "diffusers", "--out", student)
    made = module("train.checkpoint", "random", *words)
    assert made.code == 0, made.stderr
    build = ("export.build", "--checkpoint", student, "--target", "onnx", "--out", out)
    added = (
        "--text-encoder",
        write_umt5(tmp_path / "text", d_model=64),
        "--text-precision",
        "int8",
    )
    made = module(*build, "--latent-size", "4x6", "--window-frames", "6", *added,
                  "--vae", write_vae(tmp_path / "vae"))  # fmt: skip
    assert made.code == 0, made.stderr

    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in NOT_NEEDED:
        (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is blocked')\n")
    engine, video = out / "asd_fp32.onnx", tmp_path / "cat.mp4"
    words = ("--engine", engine, "--prompt", "一只猫 walks on the grass 🎈", "--frames", "7")
    shown = asd_rt("run", *words, "--out", video, "--json", PYTHONPATH=str(blocked))
    assert shown.code == 0, shown.stderr
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        size = stream.width, stream.height
        frames = sum(1 for _ in container.decode(video=0))
    assert (frames, size) == (25, (48, 32))  # 7 latent frames of 4x6: 1 + 6 * 4
    assert json.loads(shown.stdout)["frames"] == 25

    inspected = asd_rt("inspect", engine, "--json", PYTHONPATH=str(blocked))
    assert inspected.code == 0, inspected.stderr
    left = {path.name for path in out.iterdir()}
    named = {
        part["file"]
        for part in json.loads((out / "asd_fp32.onnx.json").read_text())["parts"].values()
    }
    reports = {f"asd_fp32.onnx.parity.{kind}" for kind in ("json", "md")}
    assert left == named | reports | {"asd_fp32.onnx.json"}
