"""Writing denoisers as others store them: official and diffusers folders, Self-Forcing files.

Tensors are taken, converted and written one at a time, so that memory stays at one tensor whatever the
size of the network.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from asd_rt.config import ModelConfig
from asd_rt.errors import CheckpointError
from asd_rt.progress import Progress
from train.formats.files import CONFIG, INDEX_SUFFIX
from train.formats.names import to_diffusers
from train.formats.settings import HEAD_DIM, diffusers_json, official_json
from train.formats.shapes import Shapes, is_finite
from train.formats.tensors import TYPE_NAMES

FORMATS = ("official", "diffusers", "self-forcing")
STEM = "diffusion_pytorch_model"
SHARD_BYTES = 10_000_000_000
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A network to be written.

    Attributes:
        config: of it.
        shapes: official key -> shape.
        dtypes: official key -> type to store it in.
        read: official key -> values, in any type.
    """

    config: ModelConfig
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]

    def stored(self, name: str) -> Tensor:
        """Values in the type to store.

        Raises:
            CheckpointError: they are not finite in that type.
        """
        tensor = self.read(name).detach().to(self.dtypes[name]).contiguous()
        if not is_finite(tensor):
            kind = TYPE_NAMES[tensor.dtype]
            raise CheckpointError(
                f"{name}: infinite or not-a-number values as {kind}; use --dtype bf16 or fp32"
            )
        return tensor

    def bytes(self, name: str) -> int:
        return self.dtypes[name].itemsize * torch.Size(self.shapes[name]).numel()


def write_checkpoint(
    out: Path,
    layout: str,
    source: Source,
    shard_bytes: int = SHARD_BYTES,
    extras: Mapping[str, Path] | None = None,
) -> None:
    """Write a denoiser under a temporary name, then rename it.

    Args:
        out: a folder to be made; for self-forcing a .pt file.
        layout: one of FORMATS.
        source: what to write.
        shard_bytes: start another file beyond this size.
        extras: files to copy into the folder, by name.

    Raises:
        CheckpointError: `out` exists or cannot be written, or the format cannot hold this network.
    """
    if out.exists():
        raise CheckpointError(f"--out {out}: exists; name another, or remove it first")
    if not out.parent.is_dir():
        raise CheckpointError(
            f"--out {out}: folder {out.parent} does not exist; make it: mkdir -p {out.parent}"
        )
    if layout == "self-forcing":
        _check_bare(out, source.config, extras)
    with _temporary(out) as folder, Progress(f"writing {out.name}", len(source.shapes)) as progress:
        if layout == "self-forcing":
            file = folder / STEM
            write_safetensors(
                file, source, list(source.shapes), lambda name: f"model.{name}", progress
            )
            with safe_open(file, framework="pt") as mapped:
                tensors = {name: _alone(mapped.get_tensor(name)) for name in mapped.keys()}  # noqa: SIM118
                torch.save({"generator_ema": tensors}, folder / out.name)
            (folder / out.name).rename(out)
            return
        rename, config = {
            "official": (str, official_json), "diffusers": (to_diffusers, diffusers_json),
        }[layout]  # fmt: skip
        _write_shards(folder, source, shard_bytes, rename, progress)
        _write_json(folder / CONFIG, config(source.config))
        for name, path in (extras or {}).items():
            shutil.copyfile(path, folder / name)
        for path in folder.iterdir():
            path.chmod(0o644)
        folder.chmod(0o755)
        folder.rename(out)


def write_safetensors(
    path: Path, source: Source, names: list[str], rename: Callable[[str], str], progress: Progress
) -> None:
    """Write the tensors `names` of `source` into one file, each read when its turn comes."""
    names = sorted(
        names, key=lambda name: -source.dtypes[name].itemsize
    )  # wide types first: aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + source.bytes(name)
        kind, shape = TYPE_NAMES[source.dtypes[name]], list(source.shapes[name])
        header[rename(name)] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(source.stored(name).flatten().view(torch.uint8).numpy().data)
            progress.advance(name)


def _write_shards(
    folder: Path, source: Source, limit: int, rename: Callable[[str], str], progress: Progress
) -> None:
    """One file, or several and their index, as transformers and diffusers name them."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.shapes:
        if shards[-1] and size + source.bytes(name) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += source.bytes(name)
    if len(shards) == 1:
        write_safetensors(folder / f"{STEM}.safetensors", source, shards[0], rename, progress)
        return
    listed = {}
    for i, names in enumerate(shards, 1):
        file = f"{STEM}-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, source, names, rename, progress)
        listed |= {rename(name): file for name in names}
    total = sum(source.bytes(name) for name in source.shapes)
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    _write_json(folder / f"{STEM}.safetensors{INDEX_SUFFIX}", index)


def _check_bare(out: Path, config: ModelConfig, extras: Mapping[str, Path] | None) -> None:
    """A .pt file holds tensors alone: what they do not say must be Wan2.1's."""
    if out.suffix not in (".pt", ".pth"):
        raise CheckpointError(
            f"--out {out}: a self-forcing checkpoint is a .pt file; use --out {out}.pt"
        )
    if config.head_dim != HEAD_DIM or config.text_len != 512 or config.eps != 1e-6:
        raise CheckpointError(
            f"--out {out}: a self-forcing file cannot say head_dim {config.head_dim}, text_len "
            f"{config.text_len} and eps {config.eps}, which are not Wan2.1's "
            f"({HEAD_DIM}, 512, 1e-06); use --format official"
        )
    lost = [*(extras or {}), *(["its window"] if config.local_attn_size > 0 else [])]
    if lost:
        log.warning(
            "%s: a self-forcing file cannot hold %s; give them as flags", out, ", ".join(lost)
        )


def _alone(tensor: Tensor) -> Tensor:
    """`tensor` with a storage of its own: torch.save writes whole storages."""
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone()


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in; nothing of it stays behind."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=out.parent))
        yield folder
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise CheckpointError(f"--out {out}: cannot be written ({reason or error})") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
