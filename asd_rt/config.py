"""Frozen configurations of the network and of its KV cache, shared by training, export and runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from asd_rt.errors import ConfigError

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `values`; unknown and missing keys are one error.

    Args:
        cls: a frozen dataclass.
        values: field names and values, as read from JSON or TOML. Lists become tuples.
        where: what to call the source in an error ("config.json of runs/tiny").

    Raises:
        ConfigError: unknown or missing keys, or values that `cls` refuses.
    """
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown {'keys' if len(unknown) > 1 else 'key'} {', '.join(unknown)}; "
            f"known: {', '.join(sorted(known))}"
        )
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _require_int(where: str, minimum: int, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(
                f"{where}: {name} must be a whole number >= {minimum}, found {value!r}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of the Wan2.1 denoiser, in the names of the official config.json.

    `local_attn_size` (frames, -1 = all) and `sink_size` (frames) are the checkpoint's cache
    window; they do not change any weight.
    """

    dim: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    text_len: int
    in_dim: int
    out_dim: int
    num_heads: int
    num_layers: int
    local_attn_size: int = -1
    sink_size: int = 0
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        _require_int(
            "model config",
            1,
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            freq_dim=self.freq_dim,
            text_dim=self.text_dim,
            text_len=self.text_len,
            in_dim=self.in_dim,
            out_dim=self.out_dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
        )
        if self.dim % self.num_heads:
            raise ConfigError(
                f"model config: dim {self.dim} is not a multiple of num_heads {self.num_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ConfigError(
                f"model config: dim / num_heads must be even and at least 6 for rotary positions over "
                f"time, height and width, found {self.head_dim}"
            )
        if self.freq_dim % 2:
            raise ConfigError(f"model config: freq_dim must be even, found {self.freq_dim}")
        for name in ("local_attn_size", "sink_size"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(
                    f"model config: {name} must be a whole number, found {getattr(self, name)!r}"
                )
        if type(self.eps) not in (int, float) or not 0 < self.eps < 1:
            raise ConfigError(f"model config: eps must be between 0 and 1, found {self.eps!r}")
        if tuple(self.patch_size) != (1, 2, 2):
            raise ConfigError(
                f"model config: patch_size must be [1, 2, 2], found {list(self.patch_size)}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CacheConfig:
    """Geometry of the static KV cache, in latent frames.

    Attributes:
        block_frames: frames denoised together (what the student was trained with).
        window_frames: frames that a pass attends to, its own block included; 0 = all.
        sink_frames: leading frames that never leave the window.
        max_frames: longest video the cache can hold when there is no window; 0 = no limit.
    """

    block_frames: int
    window_frames: int = 0
    sink_frames: int = 0
    max_frames: int = 0

    def __post_init__(self) -> None:
        _require_int("cache config", 1, block_frames=self.block_frames)
        _require_int(
            "cache config",
            0,
            window_frames=self.window_frames,
            sink_frames=self.sink_frames,
            max_frames=self.max_frames,
        )
        if self.window_frames and self.window_frames < self.block_frames:
            raise ConfigError(
                f"cache config: a window of {self.window_frames} frames is smaller than a block of "
                f"{self.block_frames}; use --window-frames >= {self.block_frames}, or 0 for all"
            )
        if self.window_frames and self.sink_frames >= self.window_frames:
            raise ConfigError(
                f"cache config: sink_frames {self.sink_frames} must be smaller than window_frames "
                f"{self.window_frames}"
            )
        if self.window_frames and self.sink_frames + self.block_frames > self.window_frames:
            raise ConfigError(
                f"cache config: {self.sink_frames} sink frames and a block of {self.block_frames} do not "
                f"fit into a window of {self.window_frames}; use --window-frames >= "
                f"{self.sink_frames + self.block_frames}"
            )
        if self.max_frames and self.max_frames < self.block_frames:
            raise ConfigError(
                f"cache config: max_frames {self.max_frames} is smaller than a block of {self.block_frames}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
