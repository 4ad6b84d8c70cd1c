"""Sharded latents of real clips: clips-00000.safetensors and so on, and clips.json, which lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asd_rt.errors import ConfigError
from asd_rt.files import replacing

INDEX = "clips.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Clip:
    """Where a clip comes from, and where it is.

    Attributes:
        video: path below the folder of videos.
        caption: of it.
        start_s: where it begins in the video, seconds.
        shard: file that holds it.
        row: in that file.
    """

    video: str
    caption: str
    start_s: float
    shard: str
    row: int


@dataclass(frozen=True, slots=True)
class ClipIndex:
    """What a folder of clips holds.

    Attributes:
        settings: what they were made with.
        clips: all of them.
        rejected: video -> why it gave none, when they were last made.
    """

    settings: Mapping[str, Any]
    clips: list[Clip] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)

    def seen(self) -> set[str]:
        """Videos that clips are from."""
        return {clip.video for clip in self.clips}


def read_index(folder: Path, settings: Mapping[str, Any] | None = None) -> ClipIndex:
    """The index of a folder of clips.

    Args:
        folder: of the clips.
        settings: what they must have been made with, and what a new index holds where there is none; None =
            there must be one, of any settings.

    Raises:
        ConfigError: absent, damaged, of another version, or made with other settings.
    """
    path = folder / INDEX
    if not path.exists() and settings is not None:
        return ClipIndex(settings)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format_version"] != FORMAT_VERSION:
            raise ValueError(f"version {found['format_version']}, expected {FORMAT_VERSION}")
        clips = [Clip(**entry) for entry in found["clips"]]
        index = ClipIndex(dict(found["settings"]), clips, dict(found["rejected"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: is no list of clips ({error}); make one with python -m train.clips"
        ) from error
    for name, value in (settings or {}).items():
        if index.settings.get(name) != value:
            raise ConfigError(
                f"{path}: its clips were made with {name} {index.settings.get(name)!r}, asked for is "
                f"{value!r}; name another --out, or remove the folder"
            )
    return index


def write_index(folder: Path, index: ClipIndex) -> ClipIndex:
    """Write the index; returns it."""
    document = {"format_version": FORMAT_VERSION, **asdict(index)}
    with replacing(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return index


def write_shard(folder: Path, index: ClipIndex, clips: Sequence[tuple[Clip, Tensor]]) -> ClipIndex:
    """Write clips (their shard and row are filled in) as one more shard, then the index; returns that.

    Raises:
        OutputError: no room; the index is as it was.
    """
    number = len({clip.shard for clip in index.clips})
    name = f"clips-{number:05d}.safetensors"
    placed = [replace(clip, shard=name, row=row) for row, (clip, _) in enumerate(clips)]
    with replacing(folder / name) as temporary:
        try:
            save_file(
                {"latents": torch.stack([latents for _, latents in clips]).contiguous()}, temporary
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return write_index(folder, replace(index, clips=[*index.clips, *placed]))


class ClipShards:
    """Clips to train from, mapped from disk."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of clips.

        Raises:
            ConfigError: it holds none, or a shard is absent, damaged or of another size than the index says.
        """
        self.folder, self.index = folder, read_index(folder)
        if not self.index.clips:
            raise ConfigError(f"{folder}: holds no clips")
        self._shards: dict[str, Any] = {}
        rows: dict[str, int] = {}
        for clip in self.index.clips:
            rows[clip.shard] = max(rows.get(clip.shard, 0), clip.row + 1)
        for name, count in rows.items():
            try:
                shard = safe_open(str(folder / name), "pt")
                shape = shard.get_slice("latents").get_shape()
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"{folder / name}: cannot be read ({error}); make the clips again with "
                    "python -m train.clips"
                ) from error
            if len(shape) != 5 or shape[0] != count:
                raise ConfigError(
                    f"{folder / name}: holds {list(shape)}, {INDEX} says {count} clips"
                )
            self._shards[name] = shard

    def __len__(self) -> int:
        return len(self.index.clips)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Latents float32 [B, F, C, h, w] of these clips, and their captions."""
        clips = [self.index.clips[i] for i in indices]
        latents = [self._shards[c.shard].get_slice("latents")[c.row : c.row + 1] for c in clips]
        return torch.cat(latents).float(), [clip.caption for clip in clips]


def batch_indices(
    count: int, batch: int, step: int, seed: int, rank: int = 0, ranks: int = 1
) -> list[int]:
    """Which of `count` clips process `rank` of `ranks` reads in a step: every clip once an epoch, by chance.

    It depends on the arguments alone, so a resumed run reads on where it was, and `ranks` processes together
    read what one reads with `ranks` times the batch. A step that would cross the end of an epoch takes the
    rest from the next.
    """
    wanted = range((step * ranks + rank) * batch, (step * ranks + rank + 1) * batch)
    orders: dict[int, Tensor] = {}

    def order(epoch: int) -> Tensor:
        if epoch not in orders:
            draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(count, generator=draw)
        return orders[epoch]

    return [int(order(i // count)[i % count]) for i in wanted]
