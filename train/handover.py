"""What a finished stage hands on: its averaged network as a small checkpoint folder, and where it came from.

A stage's own file holds optimizer states and lies in the run's folder; this one is a tenth of its size,
may be carried anywhere, and later stages start from it. Weights are float16. A run always goes through
these folders, so starting from carried ones gives the same run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_rt.errors import ConfigError
from asd_rt.files import replacing
from asd_rt.manifest import sha256_file
from train.checkpoint import WEIGHTS, Deployment, load_checkpoint, save_checkpoint
from train.codec import LATENT_HW, LinearCodec, VocabularyEncoder
from train.config import TrainConfig
from train.formats.files import read_json
from train.tiny_world import FPS, vocabulary

STAGE = "stage.json"
DISPLAY_SCALE = 8
MADE_BY = "python -m train keeps one in OUT/teacher and OUT/init"


@dataclass(frozen=True, eq=False)
class Handover:
    """A network to start from.

    Attributes:
        path: of its folder.
        weights: float32, rounded to float16.
        codec: of its latents.
        sha256: of its weights file.
        origin: of stage.json: stage, steps, seed, fingerprint, and of a causal start its teacher's sha256;
            empty where a checkpoint does not tell.
    """

    path: Path
    weights: dict[str, Tensor]
    codec: LinearCodec
    sha256: str
    origin: dict[str, Any]


def world_deployment(config: TrainConfig) -> Deployment:
    """How students of `config` are meant to be run."""
    return Deployment(
        block_frames=config.cache.block_frames,
        window_frames=config.cache.window_frames,
        sink_frames=config.cache.sink_frames,
        timestep_shift=config.timestep_shift,
        latent_hw=LATENT_HW,
        fps=FPS,
        display_scale=DISPLAY_SCALE,
        words=vocabulary(),
    )


def hand_on(
    folder: Path,
    config: TrainConfig,
    weights: dict[str, Tensor],
    codec: LinearCodec,
    origin: dict[str, Any],
) -> None:
    """Write the averaged `weights` of a stage as a checkpoint; `origin` becomes its stage.json.

    Raises:
        CheckpointError, OutputError: it cannot be written.
    """
    text = VocabularyEncoder(config.model.text_dim)
    told = world_deployment(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, config.model, weights, told, codec, text.table, half=True)
    with replacing(folder / STAGE) as temporary:
        temporary.write_text(json.dumps(origin, indent=1) + "\n")


def take_up(folder: Path, stage: str, config: TrainConfig) -> Handover:
    """Read what `stage` handed on, or another checkpoint of the tiny world that may stand for it.

    Args:
        folder: of the checkpoint.
        stage: "teacher" or "init"; a folder that tells of another one is refused.
        config: of the stage that goes on from here; network, cache and schedule must be its own.

    Raises:
        AsdError: no checkpoint, or one that does not fit; the message names all differences.
    """
    if not folder.exists():
        raise ConfigError(f"{folder}: no such checkpoint; {MADE_BY}")
    found = load_checkpoint(folder)
    origin: dict[str, Any] = {}
    if folder.is_dir() and (folder / STAGE).exists():
        origin = read_json(folder / STAGE)
    wanted = world_deployment(config)
    differ = [
        f"{name} {getattr(have, name)} (expected {getattr(want, name)})"
        for have, want, names in (
            (found.config, config.model, asdict(config.model)),
            (
                found.deployment,
                wanted,
                ("block_frames", "window_frames", "sink_frames", "timestep_shift"),
            ),
        )
        for name in names
        if getattr(have, name) != getattr(want, name)
    ]
    if origin.get("stage", stage) != stage:
        differ.insert(0, f"stage {origin['stage']} (expected {stage})")
    if differ:
        raise ConfigError(f"{folder}: does not fit the configuration: {', '.join(differ)}")
    text = VocabularyEncoder(config.model.text_dim)
    if found.codec is None or found.table is None or not torch.equal(found.table, text.table):
        raise ConfigError(
            f"{folder}: lacks the codec and the words of the tiny world that it was trained with; {MADE_BY}"
        )
    weights = {name: tensor.half().float() for name, tensor in found.weights.items()}
    digest = sha256_file(folder / WEIGHTS) if folder.is_dir() else found.sha256
    return Handover(folder, weights, found.codec, digest, origin)


def check_pair(teacher: Handover, init: Handover) -> None:
    """Refuse a causal start of another teacher, or of other latents.

    Raises:
        ConfigError: they do not belong together.
    """
    told = init.origin.get("teacher_sha256", teacher.sha256)
    if told != teacher.sha256:
        raise ConfigError(
            f"{init.path}: was made from another teacher than {teacher.path} (sha256 {told[:12]}..., found "
            f"{teacher.sha256[:12]}...); give the two that belong together"
        )
    if not torch.equal(init.codec.encoder, teacher.codec.encoder):
        raise ConfigError(
            f"{init.path}: has another codec than {teacher.path}; give the two that belong together"
        )
