"""Latents to video and back, block by block: how many frames there are, what it costs, and the two streams.

A codec that is `temporal` frames long makes one frame of a video's first latent frame and `temporal` of each
later one, and remembers features of what came before. One that is 1 long remembers nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import BackendError, ConfigError
from asd_rt.manifest import REBUILD, Manifest, TensorSpec

if TYPE_CHECKING:
    from asd_rt.backends.base import Engine

FloatArray = NDArray[np.float32]
STATE, NEW = "state.", "new_"  # a feature cache is state.i as an input and new_state.i as an output
SIDES = {
    "decoder": ("latents", "frames"),
    "encoder": ("frames", "latents"),
}  # what goes in, what comes out
STEP_BYTES = 2 << 30  # working memory that a step of several latent frames may take
# What ONNX Runtime took at most, in arrays of the widest layer (measured at 16x26 and 30x52): 12 of them
# alive at once, and twice as much with its arena, which grows by doubling; and what a heap loses.
LIVE_ARRAYS, ARENA_GROWTH, SLACK_BYTES = 12, 2, 256 << 20
# A full VAE takes so long on a CPU that allocating anew costs nothing; the arena would cost memory.
LARGE_CODEC_BYTES = 128 << 20
_SCALED = re.compile(r"(\d*)([A-Za-z]\w*)")


def temporal_factor(manifest: Manifest) -> int:
    """Frames that a latent frame after the first decodes to; 1 where nothing decodes."""
    return 1 if manifest.codec is None else int(manifest.codec["temporal"])


def frame_count(temporal: int, latent_frames: int) -> int:
    """Frames of a video of `latent_frames`, from its start."""
    return temporal * (latent_frames - 1) + 1 if latent_frames else 0


def block_frame_count(temporal: int, first_latent: int, latent_frames: int) -> int:
    """Frames that `latent_frames` behind `first_latent` others decode to."""
    return frame_count(temporal, first_latent + latent_frames) - frame_count(temporal, first_latent)


def start_frame_count(manifest: Manifest, blocks: int) -> int:
    """Frames that make `blocks` whole blocks of latents at a video's start."""
    return frame_count(temporal_factor(manifest), blocks * manifest.cache.block_frames)


def latent_count(temporal: int, frames: int) -> int:
    """The fewest latent frames that decode to at least `frames`."""
    return -(-(frames - 1) // temporal) + 1 if frames else 0


def resolve_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape in numbers; "8h" is 8 times the size of h.

    Raises:
        KeyError: a symbol that `sizes` does not name.
    """
    return tuple(_resolve(entry, sizes) for entry in spec.shape)


def _resolve(entry: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(entry, int):
        return entry
    match = _SCALED.fullmatch(entry)
    if match is None:
        raise KeyError(entry)
    return int(match[1] or 1) * sizes[match[2]]


def frame_size(manifest: Manifest, part: str, latent_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns in pixels of frames whose latents are of this size.

    Raises:
        BackendError: `part` of the engine is fixed to another size.
    """
    spec = manifest.parts[part]
    fixed = (*spec.inputs.items(), *spec.outputs.items())
    shape = next(tensor.shape[3:] for name, tensor in fixed if name == "latents")
    if any(isinstance(n, int) and n != size for n, size in zip(shape, latent_hw, strict=True)):
        raise BackendError(
            f"{manifest.name}: the {part} part is fixed to latents of {shape[0]}x{shape[1]}, found "
            f"{latent_hw[0]}x{latent_hw[1]}; this engine serves no other size"
        )
    spatial = int((manifest.codec or {})["spatial"])
    return latent_hw[0] * spatial, latent_hw[1] * spatial


def has_large_codec(manifest: Manifest) -> bool:
    """Whether the codec's parts run without ONNX Runtime's arena."""
    weights = manifest.parts.get("codec_weights")
    return weights is not None and weights.bytes >= LARGE_CODEC_BYTES


@dataclass(frozen=True, slots=True)
class CodecMemory:
    """Bytes of one direction of a codec, weights left out.

    Attributes:
        state_bytes: feature caches of a video, exactly; they exist once.
        working_bytes: what a step needs beside them, roughly.
        step_frames: latent frames of the largest step.
    """

    state_bytes: int
    working_bytes: int
    step_frames: int


def codec_memory(
    manifest: Manifest, part: str, latent_hw: tuple[int, int], block_frames: int | None = None
) -> CodecMemory:
    """Memory of `part` ("decoder" or "encoder") at a latent size, from the manifest alone.

    Args:
        manifest: of an engine that has this part.
        part: of the codec.
        latent_hw: latent (rows, columns).
        block_frames: latent frames handed over together; None = the engine's blocks.
    """
    sizes = dict(zip("hw", latent_hw, strict=True))
    spec = manifest.parts[part]
    states = [
        (resolve_shape(s, sizes), s) for name, s in spec.inputs.items() if name.startswith(STATE)
    ]
    state = sum(prod(shape) * np.dtype(s.dtype).itemsize for shape, s in states)
    temporal, spatial = temporal_factor(manifest), int((manifest.codec or {}).get("spatial", 1))
    pixels = 3 * latent_hw[0] * latent_hw[1] * spatial**2
    widest = max([pixels, *(prod(shape[1:]) for shape, _ in states)])
    # The attention of a Wan codec's smallest stage holds scores of all its pixels, twice.
    scores = 2 * prod(latent_hw) ** 2 if (manifest.codec or {}).get("kind") == "wan" else 0
    arrays = LIVE_ARRAYS * (1 if has_large_codec(manifest) else ARENA_GROWTH)
    each = 4 * (arrays * temporal * widest + scores)
    block = manifest.cache.block_frames if block_frames is None else block_frames
    step = max(1, min(block, STEP_BYTES // each))
    return CodecMemory(state, each * step + (SLACK_BYTES if states else 0), step)


@dataclass(frozen=True, slots=True)
class CodecStep:
    """One step of a decoder: `size` latent frames from `start` on become `frames` frames from `filled` on.

    Attributes:
        first: it begins a video.
    """

    start: int
    size: int
    filled: int
    frames: int
    first: bool


class Decoder:
    """The decoder of one video at a time: latents of blocks in, their frames out, in order.

    Attributes:
        stream: that runs the steps.
    """

    def __init__(self, engine: Engine, latent_hw: tuple[int, int]) -> None:
        """A decoder for latents of `latent_hw`; its buffers are allocated once, and on the first use.

        Raises:
            EngineError: the engine has no decoder part.
        """
        self._temporal = temporal_factor(engine.manifest)
        self.stream = engine.codec_stream("decoder", latent_hw)
        self._step = codec_memory(engine.manifest, "decoder", latent_hw).step_frames
        self._made: FloatArray = np.empty(0, np.float32)
        self.reset()

    def reset(self) -> None:
        """The next latents begin a new video."""
        self._done = 0

    def frames_shape(self, count: int) -> tuple[int, int, int, int, int]:
        """Shape of the frames that the next `count` latent frames become."""
        rows, columns = self.stream.frame_hw
        return (1, block_frame_count(self._temporal, self._done, count), 3, rows, columns)

    def steps(self, count: int) -> Iterator[CodecStep]:
        """What is to be run for the next `count` latent frames; a step that was taken counts as done."""
        start = filled = 0
        while start < count:
            first = self._temporal > 1 and not self._done
            size = 1 if first else min(self._step, count - start)
            frames = block_frame_count(self._temporal, self._done, size)
            yield CodecStep(start, size, filled, frames, first)
            start, filled, self._done = start + size, filled + frames, self._done + size

    def decode(self, latents: FloatArray) -> FloatArray:
        """Decode the next block.

        Args:
            latents: float32 [1, F, C, h, w].

        Returns:
            frames, float32 [1, frames, 3, rows, columns], in -1..1; valid until the next call.
        """
        count = latents.shape[1]
        shape = self.frames_shape(count)
        if self._made.shape != shape:
            self._made = np.empty(shape, np.float32)
        for step in self.steps(count):
            given = np.ascontiguousarray(
                latents[:, step.start : step.start + step.size], np.float32
            )
            made = self._made[:, step.filled : step.filled + step.frames]
            self.stream.step(given, made, step.first)
        return self._made


class Encoder:
    """The encoder of one video at a time: frames in, latents out, in order."""

    def __init__(self, engine: Engine, latent_hw: tuple[int, int]) -> None:
        """An encoder to latents of `latent_hw`.

        Raises:
            EngineError: the engine has no encoder part.
        """
        self._temporal = temporal_factor(engine.manifest)
        self._stream = engine.codec_stream("encoder", latent_hw)
        self._channels = int(engine.manifest.parts["encoder"].outputs["latents"].shape[2])
        self._latent_hw = latent_hw
        self._step = codec_memory(engine.manifest, "encoder", latent_hw).step_frames
        self.reset()

    def reset(self) -> None:
        """The next frames begin a new video."""
        self._done = 0

    def encode(self, frames: FloatArray) -> FloatArray:
        """Encode the next frames: of a video's start 1 + 4n of them (for a codec 4 frames long), later 4n.

        Args:
            frames: float32 [1, F, 3, rows, columns] in -1..1.

        Returns:
            latents, float32 [1, latent frames, C, h, w].

        Raises:
            ConfigError: another number or size of frames.
        """
        temporal, begins = self._temporal, not self._done
        self._check(frames, begins)
        count = frames.shape[1]
        total = (count - begins) // temporal + begins if temporal > 1 else count
        made = np.empty((1, total, self._channels, *self._latent_hw), np.float32)
        start = filled = 0
        while filled < total:
            first = temporal > 1 and not self._done
            size = 1 if first else min(self._step, total - filled)
            taken = 1 if first else size * temporal
            given = np.ascontiguousarray(frames[:, start : start + taken], np.float32)
            self._stream.step(given, made[:, filled : filled + size], first)
            start, filled, self._done = start + taken, filled + size, self._done + size
        return made

    def _check(self, frames: FloatArray, begins: bool) -> None:
        rows, columns = self._stream.frame_hw
        if frames.ndim != 5 or (frames.shape[0], *frames.shape[2:]) != (1, 3, rows, columns):
            raise ConfigError(
                f"frames must be [1, F, 3, {rows}, {columns}], found {list(frames.shape)}"
            )
        count, temporal = frames.shape[1], self._temporal
        if count < 1 or (temporal > 1 and (count - begins) % temporal):
            least = max(0, count - begins) // temporal * temporal + begins
            wanted = f"1 + {temporal}n" if begins else f"{temporal}n"
            near = [str(n) for n in (least, least + temporal) if n]
            raise ConfigError(
                f"the encoder takes {wanted} frames here, found {count}; give it {' or '.join(near)}"
            )


def latent_size(manifest: Manifest, rows: int, columns: int) -> tuple[int, int]:
    """The latent (rows, columns) of frames of `rows` x `columns` pixels.

    Raises:
        ConfigError: the engine has no codec, or is fixed to another size, or the size cannot be divided.
    """
    if manifest.codec is None:
        raise ConfigError(f"{manifest.name}: has no video codec; build it with --vae: {REBUILD}")
    spatial = int(manifest.codec["spatial"])
    fixed = manifest.latent_hw
    if fixed is not None and (rows, columns) != (fixed[0] * spatial, fixed[1] * spatial):
        raise ConfigError(
            f"frames are {rows}x{columns}, but {manifest.name} is fixed to "
            f"{fixed[0] * spatial}x{fixed[1] * spatial}; scale them"
        )
    if not rows or not columns or rows % (2 * spatial) or columns % (2 * spatial):
        raise ConfigError(
            f"frames are {rows}x{columns}; rows and columns must be multiples of {2 * spatial}: crop them to "
            f"{rows // (2 * spatial) * 2 * spatial}x{columns // (2 * spatial) * 2 * spatial}"
        )
    return rows // spatial, columns // spatial
