"""Whether a video fits into this machine's memory, and the nearest settings that do where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from asd_rt.errors import ConfigError
from asd_rt.machine import available_memory_bytes, resident_memory_bytes
from asd_rt.manifest_schema import Manifest
from asd_rt.planner import MemoryPlan, Video, plan_memory, video_of

SMALLER = {"fp32": ("bf16", "int8"), "bf16": ("int8",)}  # precisions that a CPU can fall back to
MIN_LATENT = 4  # rows or columns; less is no picture


@dataclass(frozen=True)
class Suggestion:
    """A video that fits, and how to ask for it."""

    video: Video
    text: str


def fits(video: Video, available: int) -> bool:
    """Whether `available` bytes are enough."""
    return plan_memory(video).needed <= available


def suggest(video: Video, available: int, free_size: bool) -> list[Suggestion]:
    """The nearest videos that fit into `available` bytes: one for each setting that can be changed alone.

    Where no single one is enough, a smaller precision and one more.

    Args:
        video: one that does not fit.
        available: bytes.
        free_size: the engine fixes no latent size, so that one may be chosen at run time.
    """

    def nearest(video: Video) -> list[Suggestion]:
        kinds = (_fewer_frames(video), _smaller_window(video), _smaller_latents(video, free_size))
        found = [next((s for s in kind if fits(s.video, available)), None) for kind in kinds]
        return [s for s in found if s is not None]

    precisions = list(_smaller_precisions(video))
    found = nearest(video) + [s for s in precisions if fits(s.video, available)][:1]
    for other in precisions:
        if not found:
            found = [replace(s, text=f"{other.text} and {s.text}") for s in nearest(other.video)]
    return found


def _smaller_precisions(video: Video) -> Iterator[Suggestion]:
    for precision in SMALLER.get(video.precision, ()):
        text = f"an engine of --precision {precision}"
        yield Suggestion(replace(video, precision=precision), text)


def _fewer_frames(video: Video) -> Iterator[Suggestion]:
    """Ever shorter videos; with a window, length costs nothing."""
    block = video.cache.block_frames
    if not video.cache.window_frames:
        for frames in range((video.frames - 1) // block * block, 0, -block):
            yield Suggestion(replace(video, frames=frames), f"at most {frames} frames")


def _smaller_window(video: Video) -> Iterator[Suggestion]:
    cache = video.cache
    block = cache.block_frames
    held = cache.window_frames or -(-video.frames // block) * block
    sinks = cache.sink_frames if cache.window_frames else 0
    for window in range(held - block, sinks + block - 1, -block):
        smaller = replace(cache, window_frames=window, sink_frames=sinks)
        yield Suggestion(replace(video, cache=smaller), f"an engine of --window-frames {window}")


def _smaller_latents(video: Video, free_size: bool) -> Iterator[Suggestion]:
    """Ever smaller sizes of nearly the same shape."""
    rows, columns = video.latent_hw
    for h in range(rows - 2, MIN_LATENT - 1, -2):
        w = max(MIN_LATENT, round(columns * h / rows / 2) * 2)
        if w < columns:
            size = f"latents of {h}x{w}"
            text = size if free_size else f"an engine of --latent-size {h}x{w}"
            yield Suggestion(replace(video, latent_hw=(h, w)), text)


def check_fits(
    where: Path,
    manifest: Manifest,
    frames: int,
    latent_hw: tuple[int, int],
    batch: int = 1,
    joined: bool = False,
    dumped: bool = False,
    available: int | None = None,
) -> MemoryPlan:
    """Refuse a video that this machine has not the memory for; a plan for a card is not judged.

    Args:
        where: the engine's path, for the error.
        manifest, frames, latent_hw, batch, joined, dumped: see `planner.video_of`.
        available: bytes; None = what this machine offers, and what this process holds already.

    Returns:
        the plan.

    Raises:
        ConfigError: it does not fit; says what would.
    """
    video = video_of(manifest, frames, latent_hw, batch, joined, dumped)
    plan = plan_memory(video)
    if available is None:
        offered = available_memory_bytes()
        available = None if offered is None else offered + resident_memory_bytes()
    if manifest.backend != "onnx" or available is None or plan.needed <= available:
        return plan
    nearest = suggest(video, available, manifest.latent_hw is None)
    mend = " or ".join(s.text for s in nearest) or "no setting of it does, so use a larger machine"
    h, w = latent_hw
    raise ConfigError(
        f"{where}: {frames} frames of {h}x{w} latents need {_gb(plan.needed)} of memory "
        f"({_parts(plan)}), but {_gb(available)} are available; what fits: {mend}"
    )


def _parts(plan: MemoryPlan) -> str:
    named = {"weights": plan.weights, "KV cache": plan.cache, "activations": plan.activations}
    return ", ".join(f"{name} {_gb(count)}" for name, count in named.items())


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
