"""What a user asks for against what a manifest allows; needs no opened engine, so it is checked before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import ConfigError, PromptError
from asd_rt.frame_loop import Request
from asd_rt.manifest import Manifest
from asd_rt.plan import FixedPlan
from asd_rt.schedule import MAX_STEPS
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


def make_plan(manifest: Manifest, steps: int | None, first_steps: int | None) -> FixedPlan:
    """A fixed plan; what is None comes from the manifest.

    `steps` alone keeps the manifest's first-frame enhancement, but never gives the first block fewer steps
    than the others.

    Raises:
        ConfigError: steps not in 1..4.
    """
    default = manifest.default_plan
    plan = FixedPlan(steps=default["steps"] if steps is None else steps)
    if first_steps is None:
        first_steps = max(default["first_steps"], plan.steps)
    return FixedPlan(plan.steps, first_steps)


def default_frames(manifest: Manifest) -> int:
    """Latent frames of a video when none are asked for."""
    cache = manifest.cache
    most = cache.max_frames if cache.max_frames and not cache.window_frames else DEFAULT_FRAMES
    return min(DEFAULT_FRAMES, most - most % cache.block_frames)


def prompt_tokens(path: Path, manifest: Manifest, prompt: str) -> NDArray[np.int64]:
    """Token ids [1, text_len] of `prompt`.

    Raises:
        PromptError: the engine at `path` cannot read it, or reads no prompts.
    """
    vocabulary = manifest.tokenizer
    if vocabulary is None or "text" not in manifest.parts:
        raise PromptError(
            f"{path}: has no text part, so it takes no prompt; give it embeddings with "
            "asd-rt replay --inputs FILE"
        )
    return tokenize(prompt, vocabulary["words"], manifest.model.text_len)


def check_can_decode(path: Path, manifest: Manifest) -> None:
    """Raise ConfigError when the engine at `path` makes latents only."""
    if "decoder" not in manifest.parts:
        raise ConfigError(
            f"{path}: has no decoder part, so it makes no video; use asd-rt replay for latents"
        )
