"""ODE pairs on disk: pairs-00000.safetensors and so on, and pairs.json, which says how they were made.

A pair is what a teacher's sampling passes through at the student's own noise levels, and where it ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asd_rt.errors import ConfigError
from asd_rt.files import replacing

INDEX = "pairs.json"
FORMAT_VERSION = 1
AGAIN = "run python -m train.ode_pairs again"


@dataclass(frozen=True, slots=True)
class PairSettings:
    """How pairs were made: all that they depend on.

    Attributes:
        teacher: sha256 of its tensors' names, shapes and first values.
        embeddings: sha256 of the prompts' first values.
        prompts: texts; pair i is of prompt i.
        shape: of a clip, [F, C, h, w].
        sigmas: noise levels of the path's states.
        steps, guidance, shift, seed: of the sampling.
        shard_pairs: of a file.
        dtype: they are stored in.
    """

    teacher: str
    embeddings: str
    prompts: list[str]
    shape: list[int]
    sigmas: list[float]
    steps: int
    guidance: float
    shift: float
    seed: int
    shard_pairs: int
    dtype: str

    @property
    def shards(self) -> int:
        return -(-len(self.prompts) // self.shard_pairs)

    def pairs_of(self, shard: int) -> range:
        """The pairs in a file."""
        first = shard * self.shard_pairs
        return range(first, min(first + self.shard_pairs, len(self.prompts)))


def shard_name(number: int) -> str:
    return f"pairs-{number:05d}.safetensors"


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write pairs.json, or check that the one there says the same.

    Raises:
        ConfigError: `folder` holds pairs made otherwise.
    """
    path = folder / INDEX
    document = {"format_version": FORMAT_VERSION, **settings}
    if path.exists():
        found = _read(path)
        for key, value in document.items():
            if found.get(key) != value:
                told = "" if key == "prompts" else f" {found.get(key)!r}, asked for is {value!r}"
                raise ConfigError(
                    f"{path}: its pairs were made with other {key}{told}; name another --out, or remove "
                    "the folder"
                )
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def write_shard(folder: Path, number: int, paths: Sequence[Tensor], ends: Sequence[Tensor]) -> None:
    """Write one file, whole or not at all.

    Args:
        folder: of the pairs.
        number: of the file.
        paths: states [noise levels, F, C, h, w] of each pair.
        ends: clips [F, C, h, w].

    Raises:
        OutputError: no room.
    """
    tensors = {"path": torch.stack(list(paths)), "x0": torch.stack(list(ends))}
    with replacing(folder / shard_name(number)) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format_version"] != FORMAT_VERSION:
            raise ValueError(f"version {found['format_version']}, expected {FORMAT_VERSION}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no list of ODE pairs ({error}); {AGAIN}") from error
    return dict(found)


class PairShards:
    """ODE pairs to train from, mapped from disk."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of pairs.

        Raises:
            ConfigError: pairs.json or a file is absent, damaged, or of another size than it says.
        """
        values = _read(folder / INDEX)
        del values["format_version"]
        try:
            self.settings = PairSettings(**values)
        except TypeError as error:
            raise ConfigError(f"{folder / INDEX}: {error}; {AGAIN}") from error
        self._shards = []
        for number in range(self.settings.shards):
            path = folder / shard_name(number)
            count = len(self.settings.pairs_of(number))
            clip = self.settings.shape
            wanted = {"path": [count, len(self.settings.sigmas), *clip], "x0": [count, *clip]}
            if not path.is_file():
                raise ConfigError(f"{path}: missing, the pairs are not all made; {AGAIN}")
            try:
                shard = safe_open(str(path), "pt")
                found = {name: shard.get_slice(name).get_shape() for name in wanted}
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"{path}: cannot be read ({error}); remove it and {AGAIN}"
                ) from error
            if found != wanted:
                raise ConfigError(f"{path}: holds {found}, {INDEX} says {wanted}; {AGAIN}")
            self._shards.append(shard)

    def __len__(self) -> int:
        return len(self.settings.prompts)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Paths float32 [B, noise levels, F, C, h, w] and clips [B, F, C, h, w]."""

        def row(name: str, index: int) -> Tensor:
            number, at = divmod(index, self.settings.shard_pairs)
            return self._shards[number].get_slice(name)[at : at + 1].float()

        return tuple(torch.cat([row(name, i) for i in indices]) for name in ("path", "x0"))
