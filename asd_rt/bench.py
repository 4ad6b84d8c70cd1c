"""Measuring the frame loop on one engine: warm-up, then several equal runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from asd_rt import timing
from asd_rt.arguments import make_plan
from asd_rt.errors import ConfigError
from asd_rt.frame_loop import Block
from asd_rt.manifest import Manifest
from asd_rt.noise import gaussian
from asd_rt.session import FloatArray, Session

DEFAULT_BLOCKS = 16
DEFAULT_WARMUP = 1
DEFAULT_REPEATS = 5


def measure(
    session: Session,
    blocks: int = DEFAULT_BLOCKS,
    steps: int | None = None,
    first_steps: int | None = None,
    warmup: int = DEFAULT_WARMUP,
    repeats: int = DEFAULT_REPEATS,
    latent_hw: tuple[int, int] | None = None,
    deadline_ms: float | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Generate the same video `warmup` times unmeasured and `repeats` times measured.

    Args:
        session: with an opened engine.
        blocks: of one video.
        steps, first_steps: None = the engine's plan.
        warmup: videos whose times are thrown away.
        repeats: videos whose times count.
        latent_hw: latent (rows, columns), for an engine that fixes none.
        deadline_ms: time that a block may take; steps are then the most that a block gets.
        on_block: called after every block, for a progress bar.

    Returns:
        what was measured on what (engine, its hash, device, machine, versions, plan, cache), `summary`
        of `timing.summarise`, and `records`, one a block.

    Raises:
        ConfigError: counts that are no whole numbers >= 1 (warm-up: >= 0), or too many blocks for the cache.
    """
    for name, value, least in (
        ("blocks", blocks, 1),
        ("warmup", warmup, 0),
        ("repeats", repeats, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be a whole number >= {least}, found {value!r}")
    manifest = session.manifest
    frames = blocks * manifest.cache.block_frames
    context = _context(session)
    plan = make_plan(manifest, steps, first_steps, deadline_ms)
    deadline: dict[str, Any] = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
    records: list[dict[str, Any]] = []
    for repeat in range(warmup + repeats):
        stream = session.generate_from(
            context, repeat, frames, steps, first_steps, latent_hw, **deadline
        )
        video: list[Block] = []
        for block in stream:
            video.append(block)
            on_block()
        if repeat >= warmup:
            records += [timing_record(block, video[0].index) for block in video]
    return {
        "engine": str(session.engine.path),
        "sha256": manifest.parts["denoiser"].sha256,
        "checkpoint": manifest.checkpoint,
        "precision": manifest.precision,
        "device": session.engine.device,
        "machine": timing.describe_machine(),
        "versions": timing.versions(),
        "plan": {"steps": plan.steps, "first_steps": plan.first_steps, **deadline},
        "blocks": blocks,
        "block_frames": manifest.cache.block_frames,
        "warmup": warmup,
        "repeats": repeats,
        "cache_bytes": cache_bytes(manifest, frames, latent_hw),
        "summary": timing.summarise(records),
        "records": records,
    }


def timing_record(block: Block, first_index: int = 0) -> dict[str, Any]:
    """A block's durations in the form that `asd_rt.timing` takes."""
    return {
        "block": block.index - first_index,
        "steps": block.steps,
        "joined": block.joined,
        "pass_ms": block.pass_ms,
        "denoise_ms": block.denoise_ms,
        "cache_ms": block.cache_ms,
        "hidden_ms": block.hidden_ms,
        "decode_ms": block.decode_ms,
        "block_ms": block.block_ms,
        "frames": block.latents.shape[1] if block.frames is None else len(block.frames),
        **deadline_record(block),
    }


def deadline_record(block: Block) -> dict[str, Any]:
    """How a block kept its deadline, in ms; empty where it had none."""
    report = block.deadline
    if report is None:
        return {}
    return {
        "planned_ms": report.planned_ms,
        "taken_ms": report.taken_ms,
        "budget_ms": report.budget_ms,
        "slack_ms": report.slack_ms,
        "missed": report.missed,
        "fits": report.fits,
    }


def cache_bytes(
    manifest: Manifest, frames: int, latent_hw: tuple[int, int] | None = None
) -> int | None:
    """Memory of the KV cache of a video of `frames` latent frames; None where the latent size is open."""
    hw = manifest.latent_hw or latent_hw
    if hw is None:
        return None
    size = manifest.cache.block_frames
    slots = manifest.cache.window_frames or math.ceil(frames / size) * size
    spec = manifest.parts["denoiser"].outputs.get("new_k.0")
    dtype = "float32" if spec is None else spec.dtype
    width = 2 if "16" in dtype or manifest.runtime == "openvino" else np.dtype(dtype).itemsize
    tokens = slots * hw[0] * hw[1] // 4
    return 2 * manifest.model.num_layers * tokens * manifest.model.dim * width


def _context(session: Session) -> FloatArray:
    """The embedding of the first word the engine knows; numbers do as well where it reads no prompts."""
    manifest = session.manifest
    if manifest.tokenizer is not None and manifest.tokenizer["kind"] == "vocabulary":
        words = manifest.tokenizer["words"]
        known = [word for word, token in words.items() if token]
        if known:
            return session.context(known[0])
    return gaussian((1, manifest.model.text_len, manifest.model.text_dim), 0, 0, 0)
