"""What lies around the weights of a checkpoint: how it is run, a codec, word vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_rt.config import ModelConfig, from_mapping
from asd_rt.errors import CheckpointError, ConfigError
from train.codec import PATCH, LinearCodec
from train.deployment import Deployment
from train.formats.files import CODEC, CONFIG, DEPLOYMENT, TEXT, Place, read_json
from train.formats.shapes import Shapes, check_finite, check_shapes
from train.formats.tensors import open_file


def read_parts(
    place: Place, config: ModelConfig
) -> tuple[Deployment, LinearCodec | None, Tensor | None]:
    """Deployment, codec and word vectors; the last two are of our own folders alone.

    Raises:
        CheckpointError: a file is damaged or does not fit the network, or words and their vectors do not fit.
        ConfigError: deployment.json has unknown keys or impossible values.
    """
    folder = place.folder
    if folder is None:
        return _read_deployment(place.path.parent, config, given=False), None, None
    deployment = _read_deployment(folder, config)
    codec = table = None
    if (folder / CODEC).exists():
        patch = 3 * PATCH * PATCH
        shapes = {
            "encoder": (config.in_dim, patch),
            "decoder": (patch, config.in_dim),
            "ground": (patch,),
        }
        codec = LinearCodec(config.in_dim)
        codec.load_state_dict(_read_tensors(folder / CODEC, shapes))
    if (folder / TEXT).exists():
        table = _read_tensors(folder / TEXT, {"table": (-1, config.text_dim)})["table"]
    _check_words(folder, deployment.words, table)
    return deployment, codec, table


def _read_deployment(folder: Path, config: ModelConfig, given: bool = True) -> Deployment:
    """deployment.json over the window and sink of config.json over the defaults."""
    values: dict[str, Any] = {
        "window_frames": max(0, config.local_attn_size),
        "sink_frames": config.sink_size,
    }
    path = folder / DEPLOYMENT
    if given and path.exists():
        values |= read_json(path)
    try:
        return from_mapping(Deployment, values, str(path))
    except ConfigError as error:
        where = (
            ""
            if str(error).startswith(str(path))
            else f"{path if path.exists() else folder / CONFIG}: "
        )
        raise ConfigError(f"{where}{error}") from error


def _read_tensors(path: Path, expected: Shapes) -> dict[str, Tensor]:
    """All tensors of a small file as float32; -1 in an expected shape stands for any size."""
    stored = open_file(path).tensors
    found = {name: tensor.shape for name, tensor in stored.items()}
    check_shapes(str(path), found, expected, {name: t.dtype for name, t in stored.items()})
    tensors = {name: stored[name].read().to(torch.float32) for name in expected}
    check_finite(path, tensors)
    return tensors


def _check_words(folder: Path, words: Mapping[str, int] | None, table: Tensor | None) -> None:
    if (words is None) != (table is None):
        raise CheckpointError(
            f"{folder}: words in {DEPLOYMENT} and {TEXT} belong together, found only "
            f"{'the words' if table is None else TEXT}"
        )
    if words is not None and table is not None and max(words.values()) >= len(table):
        raise CheckpointError(
            f"{folder / DEPLOYMENT}: word ids up to {max(words.values())}, but {TEXT} has {len(table)} rows"
        )
