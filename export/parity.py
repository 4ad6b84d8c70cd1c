"""The gate before an engine is accepted: every part, and a rollout, against float32 torch.

Per pass, both sides get the very same inputs, so a figure is that part's own error. The rollout goes through
`asd_rt.session`, the loop that users run, so it also proves manifest, backend and cache arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asd_rt.backends.ort import OrtEngine, open_engine
from asd_rt.errors import EngineError
from asd_rt.kv_cache import joined_mask
from asd_rt.manifest import Manifest
from asd_rt.plan import ListedPlan
from asd_rt.planner import is_large
from asd_rt.schedule import Schedule
from asd_rt.session import Replay, Session
from export.reference import TorchEngine
from train.checkpoint import Checkpoint
from train.model import Block, KeyValue, WanModel, make_rope

log = logging.getLogger(__name__)

Array = NDArray[Any]
FREE_LATENT_SIZES = ((4, 6), (6, 4))  # tried where an engine fixes no size
MAX_ROLLOUT_BLOCKS = 8


@dataclass(frozen=True)
class Budget:
    """Largest relative L2 error of one pass, and of latents and cache after a rollout."""

    one_pass: float
    rollout: float


BUDGETS = {"fp32": Budget(1e-5, 1e-4), "fp16": Budget(5e-3, 5e-2), "bf16": Budget(3e-2, 1e-1)}


def relative_l2(found: Array, expected: Array) -> float:
    """|found - expected| / |expected| in float64; infinite where a value is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-12))


def measure(
    path: Path, manifest: Manifest, checkpoint: Checkpoint, model: WanModel
) -> dict[str, Any]:
    """Compare an ONNX engine with torch; raises unless every figure is within its budget.

    Args:
        path: the engine's denoiser file; its part files lie beside it.
        manifest: of the engine.
        checkpoint: what it was exported from.
        model: `checkpoint.build_model()`.

    Returns:
        figures for the manifest: worst relative L2 per part, and of the rollout.

    Raises:
        EngineError: a figure exceeds the budget of the engine's precision; all figures are named.
    """
    budget = BUDGETS[manifest.precision]
    large = is_large(manifest.model)
    if large:  # of any latent size, see export.engine: what is costly is measured at a small one
        manifest = replace(manifest, latent_hw=None)
    engine = open_engine(path, manifest)
    try:
        passes = _measure_passes(engine, checkpoint, model)
        rollout = _measure_rollout(engine, TorchEngine(checkpoint, manifest, model))
    finally:
        engine.close()
    failed = [
        f"{k} {v:.2e} > {budget.one_pass:.0e}"
        for k, v in passes.items()
        if not v <= budget.one_pass
    ]
    failed += [
        f"{k} {v:.2e} > {budget.rollout:.0e}" for k, v in rollout.items() if not v <= budget.rollout
    ]
    if failed:
        raise EngineError(
            f"{manifest.name}: parity with float32 torch failed (relative L2): {'; '.join(failed)}; "
            "nothing was written; build with --precision fp32, or look for weights that overflow"
        )
    return {
        **({"reduced": _ran(manifest)} if large else {}),
        "metric": "relative L2 against float32 torch",
        "measured_with": engine.device,
        "budget": {"pass": budget.one_pass, "rollout": budget.rollout},
        "pass": {key: float(f"{value:.3g}") for key, value in passes.items()},
        "rollout": {key: float(f"{value:.3g}") for key, value in rollout.items()},
    }


def _latent_sizes(manifest: Manifest) -> Sequence[tuple[int, int]]:
    if manifest.latent_hw is not None:
        return (manifest.latent_hw,)
    return FREE_LATENT_SIZES[:1] if is_large(manifest.model) else FREE_LATENT_SIZES


def _ran(manifest: Manifest) -> dict[str, Any]:
    """What a large network was measured on."""
    sizes = [list(latent_hw) for latent_hw in _latent_sizes(manifest)]
    return {"latents": sizes, "rollout_frames": _rollout_frames(manifest)}


def _run(engine: OrtEngine, part: str, inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """All outputs of a part; float inputs are rounded to the dtype that the manifest names."""
    spec = engine.manifest.parts[part]
    feeds = {key: tensor.numpy().astype(spec.inputs[key].dtype) for key, tensor in inputs.items()}
    names = list(spec.outputs)
    return dict(zip(names, engine.session(part).run(names, feeds), strict=True))


def _worst(found: Mapping[str, Array], expected: Mapping[str, Tensor]) -> float:
    return max(relative_l2(found[key], tensor.numpy()) for key, tensor in expected.items())


def _flat(prefix: str, layers: Sequence[KeyValue]) -> dict[str, Tensor]:
    """Keys and values [tokens, 1, heads, D] as an engine's tensors [1, tokens, dim]."""
    return {
        f"{prefix}_{kind}.{i}": t.flatten(2).transpose(0, 1)
        for i, kv in enumerate(layers)
        for kind, t in zip("kv", kv, strict=True)
    }


@torch.inference_mode()
def _measure_passes(engine: OrtEngine, checkpoint: Checkpoint, model: WanModel) -> dict[str, float]:
    manifest, config = engine.manifest, model.config
    draw = torch.Generator().manual_seed(0)
    schedule = Schedule(manifest.timestep_shift)
    timesteps = [step.timestep for count in (4, 3, 2, 1) for step in schedule.steps(count)]
    worst = {part: 0.0 for part in manifest.parts if part != "weights"}

    def note(part: str, value: float) -> None:
        worst[part] = max(worst[part], value)

    for timestep in (0.0, *sorted(set(timesteps))):
        t = torch.full((1,), timestep)
        expected = {"modulation": modulations(model, t)[:, 0, 0]}
        note("time", _worst(_run(engine, "time", {"timestep": t}), expected))
    for batch in (1, 2):
        context = _context(checkpoint, batch, draw)
        if checkpoint.table is not None:
            tokens = torch.randint(len(checkpoint.table), (batch, config.text_len), generator=draw)
            context = checkpoint.table[tokens]
            note("text", _worst(_run(engine, "text", {"tokens": tokens}), {"context": context}))
        if batch == 1:
            prompt = model.embed_prompt(context)
            found = _run(engine, "prompt", {"context": context})
            note("prompt", _worst(found, _flat("prompt", prompt)))
        for height, width in _latent_sizes(manifest):
            if batch == 1:
                for case in _denoiser_cases(manifest, model, prompt, (height, width), draw):
                    note(case.part, _worst(_run(engine, case.part, case.inputs), case.expected))
            if checkpoint.codec is not None:
                size = (batch, manifest.cache.block_frames, config.in_dim, height, width)
                latents = torch.randn(size, generator=draw)
                frames = checkpoint.codec(latents)
                note(
                    "decoder",
                    _worst(_run(engine, "decoder", {"latents": latents}), {"frames": frames}),
                )
                expected = {"latents": checkpoint.codec.encode((frames + 1) / 2)}
                note("encoder", _worst(_run(engine, "encoder", {"frames": frames}), expected))
    return worst


def _context(checkpoint: Checkpoint, batch: int, draw: torch.Generator) -> Tensor:
    return torch.randn(
        (batch, checkpoint.config.text_len, checkpoint.config.text_dim), generator=draw
    )


def modulations(model: WanModel, timesteps: Tensor) -> Tensor:
    """What an engine's passes are modulated by at timesteps [F]: [6 * layers + 2, F, 1, dim]."""
    embedding, shared = model.embed_time(timesteps[None])
    blocks = [cast(Block, block) for block in model.blocks]
    rows = [row for block in blocks for row in (shared + block.modulation).unbind(dim=2)]
    rows += (model.head.modulation + embedding.unsqueeze(2)).unbind(dim=2)
    scales = {i for i in range(len(rows) - 2) if i % 6 in (1, 4)} | {len(rows) - 1}
    return torch.cat([row + (i in scales) for i, row in enumerate(rows)]).unsqueeze(2)


@dataclass(frozen=True)
class _Case:
    part: str
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]


def _denoiser_cases(
    manifest: Manifest,
    model: WanModel,
    prompt: list[KeyValue],
    latent_hw: tuple[int, int],
    draw: torch.Generator,
) -> Iterator[_Case]:
    """Passes over empty, half-full and full caches at noisy and clean timesteps."""
    config, block = model.config, manifest.cache.block_frames
    token_hw = (latent_hw[0] // 2, latent_hw[1] // 2)

    def latents(frames: int) -> Tensor:
        return torch.randn((1, frames, config.in_dim, *latent_hw), generator=draw)

    def time(frames: int, timestep: float) -> tuple[Tensor, Tensor]:
        return model.embed_time(torch.full((1, frames), timestep))

    full = _rollout_frames(manifest)
    kv_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
        manifest.precision, torch.float32
    )
    for past_frames in sorted({0, block, (manifest.cache.window_frames or full) - block}):
        past = None
        if past_frames:
            rope = make_rope(config, range(past_frames), token_hw)
            _, past = model.denoise(latents(past_frames), time(past_frames, 0.0), prompt, rope)
        else:
            empty = torch.zeros((0, 1, config.num_heads, config.head_dim))
            past = [KeyValue(empty, empty) for _ in range(config.num_layers)]
        # What the engine gets is rounded to its KV dtype; torch gets the same values.
        past, given = (
            [KeyValue(*(t.to(kv_dtype).float() for t in kv)) for kv in kvs]
            for kvs in (past, prompt)
        )
        rope = make_rope(config, range(past_frames, past_frames + block), token_hw)
        for timestep in (1000.0, 625.0, 0.0):
            x = latents(block)
            flow, new = model.denoise(x, time(block, timestep), given, rope, past)
            rows = modulations(model, torch.tensor([timestep]))[:, 0, 0]
            inputs = {"latents": x, "modulation": rows}
            inputs |= {"rope_cos": rope[0], "rope_sin": rope[1]}
            held = _flat("prompt", given) | _flat("past", past)
            yield _Case("denoiser", inputs | held, {"flow": flow} | _flat("new", new))
            if "joined" not in manifest.parts or not timestep:
                continue
            both = make_rope(config, range(past_frames, past_frames + 2 * block), token_hw)
            x = latents(2 * block)
            times = torch.tensor([0.0] * block + [timestep] * block)
            hidden = range(block if past_frames else 0)
            mask = torch.from_numpy(
                joined_mask(block, past_frames, hidden, token_hw[0] * token_hw[1])
            )
            flow, new = model.denoise(x, model.embed_time(times[None]), given, both, past, mask)
            inputs = {"latents": x, "modulation": modulations(model, times), "mask": mask}
            inputs |= {"rope_cos": both[0], "rope_sin": both[1]}
            yield _Case("joined", inputs | held, {"flow": flow} | _flat("new", new))


def _rollout_frames(manifest: Manifest) -> int:
    """Frames of a rollout: past the end of the window where that is affordable, three blocks without one.

    Two of a large network.
    """
    cache = manifest.cache
    block = cache.block_frames
    blocks = -(-cache.window_frames // block) + 2 if cache.window_frames else 3
    blocks = min(blocks, 2 if is_large(manifest.model) else MAX_ROLLOUT_BLOCKS)
    if cache.max_frames and not cache.window_frames:
        blocks = min(blocks, cache.max_frames // block)
    return blocks * block


def _measure_rollout(engine: OrtEngine, reference: TorchEngine) -> dict[str, float]:
    """The same noise and plan through both engines; worst relative L2 of latents and of the last cache."""
    manifest = engine.manifest
    config, frames = manifest.model, _rollout_frames(manifest)
    draw = np.random.default_rng(0)
    worst = {"latents": 0.0, "cache": 0.0}
    for height, width in _latent_sizes(manifest):
        batch = 1 if is_large(config) else 2
        shape = (batch, frames, config.in_dim, height, width)
        noise = draw.standard_normal(shape).astype(np.float32)
        context = draw.standard_normal((batch, config.text_len, config.text_dim)).astype(np.float32)

        def play(session: Session, noise: Array = noise, context: Array = context) -> Replay:
            return session.replay(noise, context, plan=ListedPlan((4, 2, 1)), dump_cache=True)

        expected = play(Session(reference, join=False))
        for join in (False, True) if engine.denoiser.can_join else (False,):
            found = play(Session(engine, join=join))
            worst["latents"] = max(worst["latents"], relative_l2(found.latents, expected.latents))
            cache = max(relative_l2(found.cache[k], expected.cache[k]) for k in expected.cache)
            worst["cache"] = max(worst["cache"], cache)
    return worst
