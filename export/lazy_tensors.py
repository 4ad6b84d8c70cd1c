"""Tensors of checkpoint files that are looked at first and read when they are asked for, without a copy."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asd_rt.errors import CheckpointError

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# What safetensors and torch raise for files that are not theirs, or not whole.
_DAMAGE = (
    *(OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError),
    pickle.UnpicklingError,
)


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """One tensor of a file.

    Attributes:
        shape: sizes.
        is_float: whether it is float32, float16 or bfloat16.
        kind: its type, for errors and for a look ("bf16", "float16").
        read: maps it into memory.
    """

    shape: tuple[int, ...]
    is_float: bool
    kind: str
    read: Callable[[], Tensor]


def open_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a .safetensors, .pth or .pt file by name.

    Raises:
        CheckpointError: it is damaged, is no such file, or holds more than tensors.
    """
    try:
        return _open_safetensors(file) if file.suffix == ".safetensors" else _open_pth(file)
    except _DAMAGE as error:
        if "GLOBAL" in str(error):  # a name of something to call
            raise CheckpointError(
                f"{file}: holds more than tensors, so loading it could run code that came with it; save "
                "its state_dict alone"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file}: cannot be read, perhaps cut short ({reason}); copy or download it again"
        ) from error


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    opened: Any = safe_open(file, framework="pt")
    found = {}
    for name in opened.keys():  # noqa: SIM118
        part = opened.get_slice(name)
        kind = part.get_dtype()

        def read(name: str = name) -> Tensor:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

        found[name] = LazyTensor(
            tuple(part.get_shape()), kind in ("F32", "F16", "BF16"), kind.lower(), read
        )
    return found


def _open_pth(file: Path) -> dict[str, LazyTensor]:
    mapped = zipfile.is_zipfile(file)  # the format before torch 1.6 can only be read into memory
    loaded = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{file}: expected tensors by name, found something else")

    def entry(tensor: Tensor) -> LazyTensor:
        kind = str(tensor.dtype).removeprefix("torch.")
        return LazyTensor(tuple(tensor.shape), tensor.dtype in FLOAT_TYPES, kind, lambda: tensor)

    return {name: entry(tensor) for name, tensor in loaded.items()}
