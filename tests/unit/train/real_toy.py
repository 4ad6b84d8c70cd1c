"""All that a run of real networks reads, at toy size and made of random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asd_rt.config import ModelConfig
from asd_rt.embeddings import write_embeddings
from train.checkpoint import save_checkpoint
from train.clip_shards import Clip, ClipIndex, write_shard
from train.model import WanModel

PROMPTS = [f"prompt {i}" for i in range(6)]
FRAMES, LATENT_HW = 6, (4, 4)
SHAPE = {
    "dim": 32, "ffn_dim": 48, "freq_dim": 16, "text_dim": 8, "text_len": 5, "in_dim": 4, "out_dim": 4,
    "num_heads": 2, "num_layers": 2,
}  # fmt: skip
STAGE = {"steps": 2, "batch": 1, "muon_lr": 2e-3, "adam_lr": 1e-3, "warmup": 1, "ema": 0.9}
SECTIONS: dict[str, Any] = {
    "model": SHAPE,
    "cache": {"block_frames": 3},
    "parallel": {"micro_batches": 2, "precision": "fp32", "save_minutes": 0.0},
    "teacher": STAGE
    | {"shift": 3.0, "mixed_noise": 0.2, "anchored_noise": 0.2, "later_share": 0.0}
    | {"drop_prompt": 0.3, "drop_attribute": 0.0},
    "init": STAGE | {"frames": FRAMES},
    "distill": {
        "steps": 4, "batch": 1, "frames": FRAMES, "student_lr": 1e-3, "critic_lr": 1e-3,
        "discriminator_lr": 1e-3, "betas": [0.0, 0.99], "critic_updates": 2, "guidance": 2.0,
        "mixed_noise": 0.3, "anchored_noise": 0.0, "step_weights": [0.4, 0.3, 0.2, 0.1],
        "first_steps_share": 0.3, "long_share": 0.0, "asd_ratio": 0.5, "asd_warmup": 0, "r1_weight": 0.1,
        "r2_weight": 0.1, "regularise_sigma": 0.05, "grad_clip": 10.0, "ema": 0.9, "ema_start": 1,
    },
}  # fmt: skip


def write_network(folder: Path, seed: int, **changes: int) -> Path:
    """A random network whose head is not zero, as a checkpoint of our own."""
    torch.manual_seed(seed)
    model = WanModel(ModelConfig(**(SHAPE | changes)))
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    save_checkpoint(folder, model.config, model.state_dict())
    return folder


def write_prompts(path: Path, prompts: Sequence[str], seed: int, **changes: int) -> Path:
    """Random embeddings of 2 to 5 tokens."""
    draw, text_dim = np.random.default_rng(seed), (SHAPE | changes)["text_dim"]
    contexts = [
        draw.standard_normal((1, 2 + i % 4, text_dim)).astype(np.float32)
        for i in range(len(prompts))
    ]
    write_embeddings(path, contexts, prompts)
    return path


def write_inputs(folder: Path) -> None:
    """Checkpoints, prompts, embeddings and clips in `folder`."""
    write_network(folder / "teacher", 1)
    write_network(folder / "student", 2)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    write_prompts(folder / "prompts.safetensors", PROMPTS, 3)
    write_prompts(folder / "negative.safetensors", ["bad"], 4)
    (folder / "clips").mkdir()
    draw = torch.Generator().manual_seed(5)
    clips = [
        (
            Clip(f"{i}.mp4", PROMPTS[i], 0.0, "", 0),
            torch.randn(FRAMES, 4, *LATENT_HW, generator=draw),
        )
        for i in range(5)
    ]
    write_shard(folder / "clips", ClipIndex({"latent_frames": FRAMES}), clips)


def write_config(
    folder: Path, leave_out: Sequence[str] = (), **changes: Mapping[str, Any] | None
) -> Path:
    """The configuration of a run from `write_inputs`, with changed sections and without some."""
    data = {
        "prompts": str(folder / "prompts.txt"),
        "embeddings": str(folder / "prompts.safetensors"),
        "negative": str(folder / "negative.safetensors"),
        "latent_hw": list(LATENT_HW),
        "clips": str(folder / "clips"),
    }
    weights = {"teacher": str(folder / "teacher"), "student": str(folder / "student")}
    sections = SECTIONS | {"data": data, "weights": weights}
    lines = ['name = "toy"', "timestep_shift = 5.0", f"clip_frames = {FRAMES}"]
    for name in [*sections, *(set(changes) - set(sections))]:
        if name in leave_out:
            continue
        lines.append(f"[{name}]")
        values = {**sections.get(name, {}), **(changes.get(name) or {})}
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path = folder / "toy.toml"
    path.write_text("\n".join(lines) + "\n")
    return path
