"""What a user asks for against what a manifest allows; needs no opened engine, so it is checked before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asd_rt.costs import CostModel
from asd_rt.deadline import DeadlinePlan
from asd_rt.decoding import start_frame_count, temporal_factor
from asd_rt.errors import ConfigError, EngineError, PromptError
from asd_rt.frame_loop import Request
from asd_rt.manifest import Manifest, late_parts
from asd_rt.plan import FixedPlan
from asd_rt.schedule import MAX_STEPS, check_steps
from asd_rt.text_encoder import TextEncoder
from asd_rt.tokenizer import tokenize

DEFAULT_FRAMES = 48


def check_renoise(request: Request, block_frames: int) -> None:
    """Refuse given noise that no plan could use, so that a misnamed tensor is not silently ignored."""
    first = 0 if request.initial is None else request.initial.shape[1] // block_frames
    end = request.shape[1] // block_frames
    for block, step in request.renoise:
        if not (first <= block < end and 0 <= step < MAX_STEPS - 1):
            raise ConfigError(
                f"renoise.block{block}.step{step} can never be used: this run generates blocks {first} to "
                f"{end - 1}, and fresh noise follows steps 0 to {MAX_STEPS - 2}"
            )


def make_plan(
    manifest: Manifest,
    steps: int | None,
    first_steps: int | None,
    deadline_ms: float | None = None,
    costs: CostModel | None = None,
) -> FixedPlan | DeadlinePlan:
    """A fixed plan, or with `deadline_ms` one that meets it; what is None comes from the manifest.

    `steps` alone keeps the manifest's first-frame enhancement, but never gives the first block fewer steps
    than the others. With a deadline both are upper bounds, and `steps` is 4 where it is None: as many as fit.

    Args:
        manifest: of the engine.
        steps: of a later block.
        first_steps: of the first block.
        deadline_ms: time that a later block may take.
        costs: of this engine on this machine, for a deadline.

    Raises:
        ConfigError: steps not in 1..4, or no possible deadline.
    """
    default = manifest.default_plan
    if steps is None:
        steps = default["steps"] if deadline_ms is None else MAX_STEPS
    check_steps(steps)
    if first_steps is None:
        first_steps = max(default["first_steps"], steps)
    if deadline_ms is None:
        return FixedPlan(steps, first_steps)
    return DeadlinePlan(deadline_ms=deadline_ms, steps=steps, first_steps=first_steps, costs=costs)


def frame_deadline_ms(manifest: Manifest, fps: float) -> float:
    """The deadline of a block, in ms, whose frames are to come at `fps` a second."""
    return manifest.cache.block_frames * temporal_factor(manifest) * 1e3 / fps


def default_frames(manifest: Manifest, given: int = 0) -> int:
    """Latent frames of a video when none are asked for, behind `given` ones that it begins with."""
    cache = manifest.cache
    limited = cache.max_frames and not cache.window_frames
    most = cache.max_frames - given if limited else DEFAULT_FRAMES
    return max(cache.block_frames, min(DEFAULT_FRAMES, most - most % cache.block_frames))


def prompt_tokens(path: Path, manifest: Manifest, prompt: str) -> NDArray[np.int64]:
    """Token ids of `prompt`: [1, text_len] by a vocabulary, [1, as many as it has] by a UMT5 tokenizer.

    Raises:
        PromptError: the engine at `path` cannot read it, or reads no prompts.
        EngineError: files of its text encoder are absent, or its tokenizer is damaged.
        BackendError: a package that reads prompts is absent.
    """
    tokenizer = manifest.tokenizer
    if tokenizer is None or "text" not in manifest.parts:
        raise PromptError(
            f"{path}: has no text part, so it takes no prompt; add one with python -m export.build "
            "--text-encoder FOLDER, or give it embeddings with asd-rt run --prompt-embeds FILE"
        )
    if late_parts(manifest):
        return TextEncoder(path, manifest).tokens(prompt)
    return tokenize(prompt, tokenizer["words"], manifest.model.text_len)


def check_can_decode(path: Path, manifest: Manifest) -> None:
    """Raise ConfigError when the engine at `path` makes latents only."""
    if "decoder" not in manifest.parts:
        raise ConfigError(
            f"{path}: has no decoder part, so it makes no video; build one with --vae, or use "
            "asd-rt replay for latents"
        )


def check_can_encode(path: Path, manifest: Manifest) -> None:
    """Raise EngineError when the engine at `path` makes no latents of pictures."""
    if "encoder" not in manifest.parts:
        raise EngineError(
            f"{path}: has no encoder part, so no video can start from a picture or a clip; build one with "
            "--vae, or start from a prompt alone"
        )


def check_start(manifest: Manifest, frames: NDArray[np.uint8]) -> None:
    """Raise ConfigError when `frames` [F, ...] are not those of whole blocks."""
    count, number = len(frames), 1
    while start_frame_count(manifest, number) < count:
        number += 1
    if start_frame_count(manifest, number) != count:
        first, second = (start_frame_count(manifest, n) for n in (1, 2))
        raise ConfigError(
            f"a start must fill whole blocks: {first}, {second}, ... {second - first} more each time, found "
            f"{count} frames; repeat a picture, or cut the clip"
        )
