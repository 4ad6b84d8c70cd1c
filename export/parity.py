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

import torch
from torch import Tensor

from asd_rt.backends.ort import OrtEngine, open_engine
from asd_rt.errors import EngineError
from asd_rt.kv_cache import joined_mask
from asd_rt.manifest import Manifest
from asd_rt.plan import ListedPlan
from asd_rt.planner import is_large
from asd_rt.schedule import TRAIN_TIMESTEPS, Schedule
from asd_rt.session import Replay, Session
from export.metrics import Array, relative_l2
from export.nonfinite import check_finite
from export.reference import TorchEngine
from export.samples import (
    latent_sizes,
    rollout_frames,
    sample_context,
    sample_latents,
    sample_noise,
)
from train.checkpoint import Checkpoint
from train.model import Block, KeyValue, WanModel, make_rope

log = logging.getLogger(__name__)

PLAN = ListedPlan((4, 2, 1))
SAMPLES_SEED = 100  # not one of calibration


@dataclass(frozen=True)
class Budget:
    """Largest relative L2 error of one pass, and of latents and cache after a rollout.

    `simulated`: of a pass, when layers for int8 are chosen.
    """

    one_pass: float
    rollout: float
    simulated: float = 0.0


BUDGETS = {
    "fp32": Budget(1e-5, 1e-4),
    "fp16": Budget(5e-3, 5e-2),
    "bf16": Budget(3e-2, 1e-1),
    "int8": Budget(1e-1, 2e-1, simulated=4e-2),
}


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
        rollout = _measure_rollout(engine, checkpoint, TorchEngine(checkpoint, manifest, model))
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


def _ran(manifest: Manifest) -> dict[str, Any]:
    """What a large network was measured on."""
    sizes = [list(latent_hw) for latent_hw in latent_sizes(manifest)]
    return {"latents": sizes, "rollout_frames": rollout_frames(manifest)}


def _run(engine: OrtEngine, part: str, inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """All outputs of a part; float inputs are rounded to the dtype that the manifest names."""
    spec = engine.manifest.parts[part]
    feeds = {key: tensor.numpy().astype(spec.inputs[key].dtype) for key, tensor in inputs.items()}
    names = list(spec.outputs)
    found = dict(zip(names, engine.session(part).run(names, feeds), strict=True))
    check_finite(engine.path.with_name(spec.file), feeds, found)
    return found


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
        context = sample_context(checkpoint, batch, SAMPLES_SEED)
        if checkpoint.table is not None:
            tokens = torch.randint(len(checkpoint.table), (batch, config.text_len), generator=draw)
            expected = {"context": checkpoint.table[tokens]}
            note("text", _worst(_run(engine, "text", {"tokens": tokens}), expected))
        if batch == 1:
            prompt = model.embed_prompt(context)
            found = _run(engine, "prompt", {"context": context})
            note("prompt", _worst(found, _flat("prompt", prompt)))
        for height, width in latent_sizes(manifest):
            if batch == 1:
                clean = sample_latents(
                    checkpoint, model, manifest, (height, width), PLAN, SAMPLES_SEED
                )
                for case in _denoiser_cases(manifest, model, prompt, clean, draw):
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
    clean: Tensor,
    draw: torch.Generator,
) -> Iterator[_Case]:
    """Passes over empty, half-full and full caches at noisy and clean timesteps, on `clean` latents."""
    config, block = model.config, manifest.cache.block_frames
    token_hw = (clean.shape[3] // 2, clean.shape[4] // 2)

    def latents(start: int, times: Tensor) -> Tensor:
        """Frames from `start` on, as many as `times`, each as noisy as its timestep says."""
        x = clean[:, torch.arange(start, start + len(times)) % clean.shape[1]]
        sigma = (times / TRAIN_TIMESTEPS).view(-1, 1, 1, 1)
        return (1 - sigma) * x + sigma * torch.randn(x.shape, generator=draw)

    def time(frames: int, timestep: float) -> tuple[Tensor, Tensor]:
        return model.embed_time(torch.full((1, frames), timestep))

    full = rollout_frames(manifest)
    kv_dtype = torch.float16 if manifest.precision == "fp16" else torch.float32
    if manifest.runtime == "openvino":
        kv_dtype = torch.bfloat16
    for past_frames in sorted({0, block, (manifest.cache.window_frames or full) - block}):
        past = None
        if past_frames:
            rope = make_rope(config, range(past_frames), token_hw)
            x = latents(0, torch.zeros(past_frames))
            _, past = model.denoise(x, time(past_frames, 0.0), prompt, rope)
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
            x = latents(past_frames, torch.full((block,), timestep))
            flow, new = model.denoise(x, time(block, timestep), given, rope, past)
            rows = modulations(model, torch.tensor([timestep]))[:, 0, 0]
            inputs = {"latents": x, "modulation": rows}
            inputs |= {"rope_cos": rope[0], "rope_sin": rope[1]}
            held = _flat("prompt", given) | _flat("past", past)
            yield _Case("denoiser", inputs | held, {"flow": flow} | _flat("new", new))
            if "joined" not in manifest.parts or not timestep:
                continue
            both = make_rope(config, range(past_frames, past_frames + 2 * block), token_hw)
            times = torch.tensor([0.0] * block + [timestep] * block)
            x = latents(past_frames, times)
            hidden = range(block if past_frames else 0)
            mask = torch.from_numpy(
                joined_mask(block, past_frames, hidden, token_hw[0] * token_hw[1])
            )
            flow, new = model.denoise(x, model.embed_time(times[None]), given, both, past, mask)
            inputs = {"latents": x, "modulation": modulations(model, times), "mask": mask}
            inputs |= {"rope_cos": both[0], "rope_sin": both[1]}
            yield _Case("joined", inputs | held, {"flow": flow} | _flat("new", new))


def _measure_rollout(
    engine: OrtEngine, checkpoint: Checkpoint, reference: TorchEngine
) -> dict[str, float]:
    """The same noise and plan through both engines; worst relative L2 of latents and of the last cache."""
    manifest = engine.manifest
    worst = {"latents": 0.0, "cache": 0.0}
    batch = 1 if is_large(manifest.model) else 2
    for latent_hw in latent_sizes(manifest):
        noise = sample_noise(manifest, latent_hw, batch, SAMPLES_SEED)
        context = sample_context(checkpoint, batch, SAMPLES_SEED).numpy()

        def play(session: Session, noise: Array = noise, context: Array = context) -> Replay:
            return session.replay(noise, context, plan=PLAN, dump_cache=True)

        expected = play(Session(reference, join=False))
        for join in (False, True) if engine.denoiser.can_join else (False,):
            found = play(Session(engine, join=join))
            worst["latents"] = max(worst["latents"], relative_l2(found.latents, expected.latents))
            cache = max(relative_l2(found.cache[k], expected.cache[k]) for k in expected.cache)
            worst["cache"] = max(worst["cache"], cache)
    return worst
