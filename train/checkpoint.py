"""Checkpoint folders: config.json, model.safetensors, and what a student needs around it. One strict way in.

| file | content |
|---|---|
| config.json | ModelConfig; official metadata keys (`METADATA_KEYS`) are dropped |
| model.safetensors | every weight under its official key; float32, float16 or bfloat16, loaded as float32 |
| deployment.json | optional: `Deployment` |
| codec.safetensors | optional: the buffers of `LinearCodec` |
| text_encoder.safetensors | optional: `table` [words + 1, text_dim] of `VocabularyEncoder` |
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asd_rt.config import ModelConfig, from_mapping
from asd_rt.errors import CheckpointError, ConfigError
from train.codec import PATCH, LinearCodec
from train.deployment import Deployment
from train.model import WanModel

CONFIG, WEIGHTS, DEPLOYMENT = "config.json", "model.safetensors", "deployment.json"
CODEC, TEXT = "codec.safetensors", "text_encoder.safetensors"
FILES = (CONFIG, WEIGHTS, DEPLOYMENT, CODEC, TEXT)
METADATA_KEYS = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "model_type"})
FLOAT_TYPES = ("F32", "F16", "BF16")
MAX_LISTED = 40

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint in memory, complete and checked.

    Attributes:
        name: of its folder.
        sha256: over names and contents of all its files.
        config: of the network.
        weights: float32, official keys.
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

    def build_model(self) -> WanModel:
        """The network with these weights, in evaluation mode and without gradients."""
        with torch.device("meta"):
            model = WanModel(self.config)
        model.load_state_dict(self.weights, assign=True)
        return model.eval().requires_grad_(False)


def weight_shapes(config: ModelConfig) -> Shapes:
    """Official key -> shape of every weight of a network of `config`."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in WanModel(config).state_dict().items()}


def describe_checkpoint(folder: Path | str) -> Checkpoint:
    """A checkpoint without its weights and their hash, to plan with; otherwise as `load_checkpoint`."""
    folder = Path(folder)
    _check_present(folder)
    config, deployment = _read_settings(folder)
    return Checkpoint(folder.resolve().name, "0" * 64, config, {}, deployment, None, None)


def load_checkpoint(folder: Path | str) -> Checkpoint:
    """Read a checkpoint folder; either all of it fits or nothing is loaded.

    Args:
        folder: with the files named at the top of this module.

    Raises:
        CheckpointError: a file is absent or damaged, or tensors are missing, extra, misshapen, of another
            type or not finite (all of them in one message).
        ConfigError: config.json or deployment.json has unknown keys or impossible values.
    """
    folder = Path(folder)
    _check_present(folder)
    config, deployment = _read_settings(folder)
    weights = _read_tensors(folder / WEIGHTS, weight_shapes(config))
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
    return Checkpoint(
        folder.resolve().name, _digest(folder), config, weights, deployment, codec, table
    )


def _check_present(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; a checkpoint is a folder with {CONFIG} and {WEIGHTS}"
        )
    absent = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: {' and '.join(absent)} missing; a checkpoint is {CONFIG} and {WEIGHTS}"
        )


def _read_settings(folder: Path) -> tuple[ModelConfig, Deployment]:
    values = _read_json(folder / CONFIG)
    values = {name: value for name, value in values.items() if name not in METADATA_KEYS}
    config = from_mapping(ModelConfig, values, str(folder / CONFIG))
    return config, _read_deployment(folder, config)


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

    An existing checkpoint at `folder` is replaced; other files there (a model card) are kept.

    Args:
        folder: to be made; its parent must exist.
        config: of the network.
        weights: official keys; exactly those of a network of `config`.
        deployment: written as deployment.json unless None.
        codec: written as codec.safetensors unless None.
        table: word vectors [words + 1, text_dim], written as text_encoder.safetensors unless None.
        half: store `weights` rounded to float16 (else float32).

    Raises:
        CheckpointError: weights that do not fit `config`, are not finite or overflow float16, or a folder
            that cannot be written.
    """
    folder = Path(folder)
    dtype = torch.float16 if half else torch.float32
    stored = {
        name: weights[name].detach().to(dtype).contiguous().clone() for name in sorted(weights)
    }
    _check_shapes(
        f"{folder / WEIGHTS}", {k: tuple(t.shape) for k, t in stored.items()}, weight_shapes(config)
    )
    _check_finite(folder / WEIGHTS, stored)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in FILES and path.is_file():
                    shutil.copy2(path, temporary)
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _read_deployment(folder: Path, config: ModelConfig) -> Deployment:
    """deployment.json over the window and sink of config.json over the defaults."""
    values: dict[str, Any] = {
        "window_frames": max(0, config.local_attn_size),
        "sink_frames": config.sink_size,
    }
    path = folder / DEPLOYMENT
    if path.exists():
        values |= _read_json(path)
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
    """All tensors of a safetensors file as float32; -1 in an expected shape stands for any size."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: tuple(s.get_shape()) for name, s in slices.items()}
            types = {name: s.get_dtype() for name, s in slices.items()}
            _check_shapes(str(path), found, expected, types)
            tensors = {name: file.get_tensor(name).to(torch.float32) for name in expected}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file, perhaps cut short ({error}); copy or download it again"
        ) from error
    _check_finite(path, tensors)
    return tensors


def _check_shapes(
    where: str, found: Shapes, expected: Shapes, types: Mapping[str, str] | None = None
) -> None:
    """Raise one CheckpointError that lists every missing, extra, misshapen or wrongly typed tensor."""
    problems = [f"{name} missing {list(expected[name])}" for name in expected if name not in found]
    problems += [
        f"{name} extra {list(shape)}" for name, shape in found.items() if name not in expected
    ]
    for name, shape in found.items():
        want = expected.get(name, shape)
        fits = len(shape) == len(want) and all(
            w in (-1, s) for s, w in zip(shape, want, strict=True)
        )
        if not fits:
            problems.append(f"{name} misshapen: expected {list(want)}, found {list(shape)}")
        elif types is not None and types[name] not in FLOAT_TYPES:
            problems.append(
                f"{name} of type {types[name]}: expected one of {', '.join(FLOAT_TYPES)}"
            )
    if problems:
        more = [] if len(problems) <= MAX_LISTED else [f"and {len(problems) - MAX_LISTED} more"]
        raise CheckpointError(
            f"{where}: {len(problems)} of {len(expected)} tensors do not fit the configuration: "
            + "; ".join(problems[:MAX_LISTED] + more)
        )


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(
            f"{path}: infinite or not-a-number values in {', '.join(bad[:MAX_LISTED])}"
        )


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


def _digest(folder: Path) -> str:
    """sha256 over name and sha256 of each file of the checkpoint."""
    whole = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if path.exists():
            with path.open("rb") as file:
                whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
