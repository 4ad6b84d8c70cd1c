"""Checkpoints: a denoiser in any format of docs/checkpoints.md and what a student needs around it.

One strict way in, for training and export.

A folder of our own:

| file | content |
|---|---|
| config.json | ModelConfig; official metadata keys are dropped |
| model.safetensors | every weight under its official key; float32, float16 or bfloat16 |
| deployment.json | optional: `Deployment` |
| codec.safetensors | optional: the buffers of `LinearCodec` |
| text_encoder.safetensors | optional: `table` [words + 1, text_dim] of `VocabularyEncoder` |

`python -m train.checkpoint --help` makes random checkpoints and converts between formats.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from asd_rt.config import ModelConfig
from asd_rt.errors import CheckpointError
from train.checkpoint_parts import read_parts
from train.codec import LinearCodec
from train.deployment import Deployment
from train.formats.files import (
    CODEC,
    CONFIG,
    DEPLOYMENT,
    SHARD,
    TEXT,
    Place,
    digest,
    locate,
)
from train.formats.kinds import refuse_others, undistilled
from train.formats.names import TABLES, bare, is_diffusers, to_official
from train.formats.settings import contradictions, network_config
from train.formats.shapes import check_finite, check_shapes, listing, weight_shapes
from train.formats.tensors import Contents, Stored, open_tensors
from train.model import WanModel

WEIGHTS = "model.safetensors"
FILES = (CONFIG, WEIGHTS, DEPLOYMENT, CODEC, TEXT)
SHAPE_KEYS = (
    "dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "in_dim", "out_dim", "num_heads", "num_layers",
    "eps",
)  # fmt: skip
log = logging.getLogger("train.checkpoint")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint, complete and checked.

    Attributes:
        name: of its folder or file.
        sha256: of a single file, that file's; of a folder, over names and contents of all its files.
        config: of the network.
        weights: official keys, in the type they are stored in, mapped from disk: no copy is in memory, and
            the files must stay as they are while these are used.
        deployment: how it is meant to be run.
        codec: latents <-> frames; None = latents only.
        table: word vectors float32 [words + 1, text_dim]; None = no text encoder.
    """

    name: str
    sha256: str
    config: ModelConfig
    weights: dict[str, Tensor]
    deployment: Deployment
    codec: LinearCodec | None
    table: Tensor | None

    def build_model(self, dtype: torch.dtype = torch.float32) -> WanModel:
        """The network with these weights, in evaluation mode and without gradients.

        Args:
            dtype: to compute in; weights stored in it stay mapped from disk, others are converted one by one.
        """
        with torch.device("meta"):
            model = WanModel(self.config)
        weights = {name: tensor.to(dtype) for name, tensor in self.weights.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint in any known format; either all of it fits or nothing is loaded.

    Args:
        path: a folder (ours, Wan2.1's, or diffusers', with or without its transformer/ subfolder), or one
            .safetensors, .pt or .pth file.

    Raises:
        CheckpointError: a file is absent or damaged, is something else (a LoRA, quantised, another network),
            or tensors are missing, extra, misshapen, of another type or not finite (all in one message).
        ConfigError: config.json or deployment.json has unknown keys or impossible values.
    """
    place = locate(Path(path))
    found = _look(place)
    config, shapes = found.config, {name: t.shape for name, t in found.stored.items()}
    expected = weight_shapes(config)
    types = {name: tensor.dtype for name, tensor in found.stored.items()}
    check_shapes(str(place.path), shapes, expected, types, found.note)
    deployment, codec, table = read_parts(place, config)

    weights = {name: found.stored[name].read() for name in expected}
    check_finite(place.path, weights)
    checkpoint = Checkpoint(place.name, digest(place), config, weights, deployment, codec, table)
    _report(place, found.contents, found.origin, config)
    return checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What is known of a checkpoint before a weight is read.

    Attributes:
        contents: its files'.
        stored: tensors under official keys.
        config, origin: of the network, and where what config.json does not say came from.
        note: what contradicts, for errors.
    """

    contents: Contents
    stored: dict[str, Stored]
    config: ModelConfig
    origin: Mapping[str, str]
    note: str


def _look(place: Place) -> _Found:
    contents = open_tensors(place)
    stored = _official(place, contents)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    config, origin = network_config(str(place.path), place.config, shapes)
    note = contradictions(place.config, config, shapes)
    if place.folder is None and SHARD.search(place.path.name):
        note += "this is one shard of several, give the folder; "
    return _Found(contents, stored, config, origin, note)


def open_weights(
    path: Path | str, config: ModelConfig, name: str
) -> dict[str, Callable[[], Tensor]]:
    """What reads each weight of a network of `config`; nothing is read before, and no hash is taken.

    Args:
        path: as in `load_checkpoint`.
        config: the network that is expected.
        name: of the setting that expects it, for errors.

    Raises:
        CheckpointError: it cannot be opened, or is of another shape.
        ConfigError: its config.json has unknown keys or impossible values.
    """
    place = locate(Path(path))
    found = _look(place)
    shapes = {key: t.shape for key, t in found.stored.items()}
    types = {key: tensor.dtype for key, tensor in found.stored.items()}
    check_shapes(str(place.path), shapes, weight_shapes(found.config), types, found.note)
    differing = [
        f"{key} {getattr(found.config, key)} (expected {getattr(config, key)})"
        for key in SHAPE_KEYS
        if getattr(found.config, key) != getattr(config, key)
    ]
    if differing:
        raise CheckpointError(
            f"{name} {path}: is a network of another shape: {', '.join(differing)}; name another, or say its "
            "shape in the configuration"
        )
    return {key: found.stored[key].read for key in shapes}


def describe_checkpoint(path: Path | str) -> Checkpoint:
    """A checkpoint without its weights and their hash, to plan with; otherwise as `load_checkpoint`."""
    place = locate(Path(path))
    config = _look(place).config
    deployment, codec, table = read_parts(place, config)
    return Checkpoint(place.name, "0" * 64, config, {}, deployment, codec, table)


def _official(place: Place, contents: Contents) -> dict[str, Stored]:
    """Tensors under their official keys; rotary tables are left out."""
    tensors = {name: bare(name) for name in contents.tensors}
    refuse_others(str(place.path), {tensors[name]: t.dtype for name, t in contents.tensors.items()})
    translate = to_official if is_diffusers(tensors.values()) else str
    found: dict[str, Stored] = {}
    origin: dict[str, str] = {}
    twice = []
    for name, tensor in contents.tensors.items():
        key = translate(tensors[name])
        if TABLES.fullmatch(key):
            continue
        if key in found:
            twice.append(f"{origin[key]} and {name}")
        found[key], origin[key] = tensor, name
    if twice:
        raise CheckpointError(
            f"{place.path}: {len(twice)} tensors twice, under two names: {listing(twice)}; "
            "save one network alone"
        )
    return found


def _report(
    place: Place, contents: Contents, origin: Mapping[str, str], config: ModelConfig
) -> None:
    """Say what had to be chosen, and what the file says against itself."""
    if contents.inside:
        log.info("%s: weights of %s", place.path, ".".join(contents.inside))
    if place.config is None:
        told = ", ".join(f"{name} {getattr(config, name)} ({why})" for name, why in origin.items())
        log.info("%s: no config.json: %s", place.path, told)
    names = [place.name, *(path.name for path in place.weights)]
    word = undistilled([*names, *contents.notes])
    if word is not None:
        log.warning(
            "%s: says %r: ODE-initialised, not yet distilled; videos will be blurred, distil it first "
            "or use the distilled file",
            place.path,
            word,
        )


def save_checkpoint(
    folder: Path | str,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    deployment: Deployment | None = None,
    codec: LinearCodec | None = None,
    table: Tensor | None = None,
    half: bool = False,
) -> None:
    """Write a checkpoint folder as a whole: it is written under a temporary name, then renamed.

    An existing checkpoint at `folder` is replaced; other files and folders there (a model card) are copied
    over before that, links as links.

    Args:
        folder: to be made; its parent must exist.
        config: of the network.
        weights: official keys; exactly those of a network of `config`.
        deployment: written as deployment.json unless None.
        codec: written as codec.safetensors unless None.
        table: word vectors [words + 1, text_dim], written as text_encoder.safetensors unless None.
        half: store `weights` rounded to float16 (else float32).

    Raises:
        CheckpointError: weights that do not fit `config`, are not finite or overflow float16, a file in the
            place of the folder, or a folder that cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder to write the checkpoint to, found a file; name another"
        )
    dtype = torch.float16 if half else torch.float32
    stored = {
        name: weights[name].detach().to(dtype).contiguous().clone() for name in sorted(weights)
    }
    check_shapes(
        f"{folder / WEIGHTS}", {k: tuple(t.shape) for k, t in stored.items()}, weight_shapes(config)
    )
    check_finite(folder / WEIGHTS, stored)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        if folder.is_dir():
            own = set(FILES)
            shutil.copytree(
                folder,
                temporary,
                symlinks=True,
                ignore=lambda where, _: own if Path(where) == folder else set(),
                dirs_exist_ok=True,
            )
        temporary.chmod(0o755)
        _write_json(temporary / CONFIG, config.to_json())
        save_file(stored, temporary / WEIGHTS, metadata={"format": "pt"})
        if deployment is not None:
            _write_json(temporary / DEPLOYMENT, asdict(deployment))
        if codec is not None:
            buffers = {name: t.contiguous().clone() for name, t in codec.state_dict().items()}
            save_file(buffers, temporary / CODEC, metadata={"format": "pt"})
        if table is not None:
            save_file(
                {"table": table.contiguous().clone()}, temporary / TEXT, metadata={"format": "pt"}
            )
        for path in temporary.iterdir():
            if path.is_file() and not path.is_symlink():
                path.chmod(0o644)
        load_checkpoint(temporary)
        _swap_in(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the checkpoint cannot be written ({error})") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap_in(new: Path, folder: Path) -> None:
    """Put folder `new` in the place of `folder`; the old one is gone only when the new one is there."""
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old{os.getpid()}")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from train.checkpoint_command import main

    sys.exit(main())
