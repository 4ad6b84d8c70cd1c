"""Tensors of weight files, mapped from disk in their stored type: safetensors and torch's .pt.

Shapes and types are known at once; values are read from disk where they are used, and never copied here.
Nothing in a file is ever run.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asd_rt.errors import CheckpointError
from train.formats.files import Place
from train.formats.shapes import listing

AGAIN = "copy or download it again"
# Where training programs keep the network in a .pt file, the better choice first.
CONTAINERS = ("generator_ema", "generator", "model", "state_dict")
TYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
# What torch.load raises for files that are damaged or none of its own.
TORCH_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
    AttributeError, AssertionError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor in a file.

    Attributes:
        shape: of it.
        dtype: in the names of safetensors (F32, BF16, ...).
        read: its values, mapped from the file in the stored type.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What a checkpoint holds, under the names of its files.

    Attributes:
        tensors: by name.
        notes: words that a file says about itself, such as its metadata.
        inside: the entries of a .pt file that led to the tensors ("generator_ema"); empty = bare.
    """

    tensors: Mapping[str, Stored]
    notes: tuple[str, ...]
    inside: tuple[str, ...]


def open_tensors(place: Place) -> Contents:
    """All tensors of a checkpoint; of sharded ones those that the index names, no more and no less.

    Raises:
        CheckpointError: a file is damaged, of another format, or not what the index says.
    """
    if place.listed is None:
        return open_file(place.path)
    tensors: dict[str, Stored] = {}
    notes: list[str] = []
    problems = []
    for path in place.weights:
        shard = open_file(path)
        notes += shard.notes
        named = {name for name, file in place.listed.items() if file == path}
        problems += [f"{name} not in {path.name}" for name in sorted(named - set(shard.tensors))]
        problems += [
            f"{name} in {path.name} besides" for name in sorted(set(shard.tensors) - named)
        ]
        tensors |= shard.tensors
    if problems:
        raise CheckpointError(
            f"{place.path}: {len(problems)} tensors are not where the index says: {listing(problems)}; "
            f"{AGAIN}, index and shards alike"
        )
    return Contents(tensors, tuple(notes), ())


def open_file(path: Path) -> Contents:
    """All tensors of one file, told by its content rather than by its suffix.

    Raises:
        CheckpointError: it is empty, damaged or of another format.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not head:
        raise CheckpointError(f"{path}: is empty (0 bytes); {AGAIN}")
    if head.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path}: is a GGUF file, whose weights are quantised; give the original fp32, fp16 or bf16 "
            "weights as .safetensors"
        )
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the weights; fetch them: git lfs pull"
        )
    zipped = head.startswith(b"PK\x03\x04")
    if zipped and path.suffix == ".safetensors":  # torch goes by the suffix
        raise CheckpointError(
            f"{path}: is a .pt file under another name; rename it to {path.stem}.pt"
        )
    if zipped or (path.suffix != ".safetensors" and head[8:9] != b"{"):
        return _open_torch(path, zipped)
    return _open_safetensors(path)


def _open_safetensors(path: Path) -> Contents:
    try:
        file = safe_open(path, framework="pt")
        tensors = {}
        for name in file.keys():  # noqa: SIM118  it is no mapping
            header = file.get_slice(name)
            read = partial(file.get_tensor, name)
            tensors[name] = Stored(tuple(header.get_shape()), header.get_dtype(), read)
        notes = [f"{key} {value}" for key, value in (file.metadata() or {}).items()]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file, perhaps cut short ({_line(error)}); {AGAIN}"
        ) from error
    return Contents(tensors, tuple(notes), ())


def _open_torch(path: Path, zipped: bool) -> Contents:
    try:
        with warnings.catch_warnings():  # of old pickles; what matters is said below
            warnings.simplefilter("ignore")
            value: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except TORCH_ERRORS as error:
        # "Unsupported global: GLOBAL os.system was not ...": a name, of a built-in without its module.
        code = re.search(r"GLOBAL ([A-Za-z_][\w.]*)|global:? ([A-Za-z_][\w.]*\.\w+)", str(error))
        if code is not None:
            raise CheckpointError(
                f"{path}: holds pickled code ({code[1] or code[2]}), which is never run; give a file with "
                "tensors alone, such as .safetensors"
            ) from error
        raise CheckpointError(
            f"{path}: not a readable .pt file, perhaps cut short ({_line(error)}); {AGAIN}"
        ) from error

    inside: list[str] = []
    notes: list[str] = []
    while True:
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{path}: expected a dictionary of tensors, found {type(value).__name__}; "
                "save model.state_dict()"
            )
        key = next((k for k in CONTAINERS if isinstance(value.get(k), Mapping) and value[k]), None)
        if key is None:
            break
        notes += [f"{k} {v}" if isinstance(v, str) else f"{k}" for k, v in value.items()]
        inside.append(key)
        value = value[key]
    others = [f"{k} ({type(v).__name__})" for k, v in value.items() if not isinstance(v, Tensor)]
    if others or not value:
        raise CheckpointError(
            f"{path}: expected tensors, in {', '.join(CONTAINERS)} or on their own, found "
            f"{listing(others, ', ') or 'nothing'}; save model.state_dict()"
        )
    tensors = {
        str(name): Stored(tuple(t.shape), TYPE_NAMES.get(t.dtype, str(t.dtype)), t.detach)
        for name, t in value.items()
    }
    return Contents(tensors, tuple(notes), tuple(inside))


def _line(error: BaseException) -> str:
    """The message of `error` in one line, without its advice to run whatever code a file brings."""
    words = " ".join(str(error).split()) or type(error).__name__
    _, found, detail = words.partition("WeightsUnpickler error: ")
    return (detail if found else words.partition(". ")[0]).partition(" Check the doc")[0][:200]
