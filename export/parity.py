"""The gate before an engine is accepted: every part, and a rollout, against float32 torch.

Per pass, both sides get the very same inputs, so a figure is that part's own error. The rollout goes through
`asd_rt.session`, the loop that users run, so it also proves manifest, backend and cache arithmetic.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asd_rt.backends.ort import OrtEngine, open_engine
from asd_rt.errors import EngineError
from asd_rt.machine import bf16_instructions
from asd_rt.manifest import Manifest
from asd_rt.planner import is_large
from asd_rt.schedule import Schedule
from asd_rt.session import Replay, Session
from export.drift import Drift, build_blocks, longest, measure_drift
from export.layer_errors import LayerError, measure_layers, worst_layer
from export.metrics import Array, relative_l2, short
from export.passes import (
    PLAN,
    SAMPLES_SEED,
    checkpoint_cases,
    flat,
    modulations,
    run_part,
    step_cases,
    worst_error,
)
from export.reference import TorchEngine
from export.rounding import as_on_a_card, narrow_type
from export.samples import latent_sizes, rollout_frames, sample_context, sample_noise
from train.checkpoint import Checkpoint
from train.model import WanModel

log = logging.getLogger(__name__)


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
    "fp8": Budget(1e-1, 2e-1, simulated=6e-2),
}


@dataclass(frozen=True)
class Gate:
    """What the gate found.

    Attributes:
        figures: for the manifest: worst relative L2 per part and of rollouts, budgets, and "inaccurate" where
            budgets are missed.
        drift: of a rollout by the engine's own plan; None where none was asked for.
        layers: where the error arises; measured where budgets are missed.
        worst_pass, worst_rollout: largest of those figures; infinite where one is not finite.
    """

    figures: dict[str, Any]
    drift: Drift | None
    layers: tuple[LayerError, ...]
    worst_pass: float
    worst_rollout: float

    @property
    def finite(self) -> bool:
        """Whether all figures are numbers; an engine for which they are not is of no use."""
        return bool(np.isfinite([self.worst_pass, self.worst_rollout]).all())


def measure(
    path: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    model: WanModel,
    blocks: int | None = None,
) -> Gate:
    """Compare an ONNX engine with torch.

    Args:
        path: the engine's denoiser file; its part files lie beside it.
        manifest: of the engine.
        checkpoint: what it was exported from.
        model: `checkpoint.build_model()`.
        blocks: of the rollout by the engine's own plan; None = as a build has time for.
    """
    budget = BUDGETS[manifest.precision]
    large = is_large(manifest.model)
    if large:  # of any latent size, see export.engine: what is costly is measured at a small one
        manifest = replace(manifest, latent_hw=None)
    reference = TorchEngine(checkpoint, manifest, model)
    drift = None
    with opened(path, manifest) as engine:
        device = _device(engine, manifest)
        passes = _measure_passes(engine, checkpoint, model)
        rollout = _measure_rollout(engine, checkpoint, reference)
        if blocks != 0:
            count = build_blocks(manifest) if blocks is None else longest(manifest, blocks)
            drift, _ = measure_drift(engine, reference, checkpoint, count)
    failed = _failures(passes, rollout, budget)
    layers = measure_layers(path, manifest, checkpoint, model) if failed else []
    figures = {
        **({"reduced": _ran(manifest)} if large else {}),
        "metric": "relative L2 against float32 torch",
        "measured_with": device,
        "budget": {"pass": budget.one_pass, "rollout": budget.rollout},
        "pass": {key: short(value) for key, value in passes.items()},
        "rollout": {key: short(value) for key, value in rollout.items()},
        **({} if drift is None else {"drift": drift.summary()}),
        **({"inaccurate": [*failed, worst_layer(layers)]} if failed else {}),
    }
    worst = max(passes.values()), max(rollout.values())
    return Gate(figures, drift, tuple(layers), *worst)


@contextmanager
def opened(path: Path, manifest: Manifest) -> Iterator[OrtEngine]:
    """An ONNX engine to be measured, computing as it does where it will run; closed in the end."""
    with as_on_a_card(path, manifest) as shown:
        engine = open_engine(*shown)
        try:
            yield engine
        finally:
            engine.close()


def _device(engine: OrtEngine, manifest: Manifest) -> str:
    """What an engine is measured with, and in which arithmetic where that is another than it says."""
    narrow = narrow_type(manifest)
    if narrow is not None:
        return f"{engine.device}, every result rounded to {narrow}"
    if engine.manifest.runtime == "openvino" and not bf16_instructions():
        return f"{engine.device}, in float32 for want of bfloat16 instructions"
    return engine.device


def accept(
    name: str, gate: Gate, allow_inaccurate: bool, precision: str, is_plan: bool = False
) -> None:
    """Let an engine pass the gate, or refuse it.

    Args:
        name: of the engine.
        gate: what was measured.
        allow_inaccurate: take it with finite figures.
        precision: of the engine.
        is_plan: it becomes a TensorRT plan, for which there is no fp32.

    Raises:
        EngineError: a figure exceeds the budget of the engine's precision, and that is not allowed or not
            even finite; all figures are named, and the layer where most of the error arises.
    """
    missed = "; ".join(gate.figures.get("inaccurate", ()))
    if not missed:
        return
    if gate.finite and allow_inaccurate:
        log.warning("  inaccurate, as --allow-inaccurate allows: %s", missed)
        return
    allowed = ", or take it as it is: --allow-inaccurate" if gate.finite else ""
    better = ("fp16", "bf16") if is_plan else ("fp32",)
    others = " or ".join(other for other in better if other != precision)
    advised = f"build with --precision {others}, or " if others else ""
    raise EngineError(
        f"{name}: parity with float32 torch failed (relative L2): {missed}; nothing was written; "
        f"{advised}look for weights that overflow{allowed}"
    )


def _failures(
    passes: Mapping[str, float], rollout: Mapping[str, float], budget: Budget
) -> list[str]:
    """Figures that miss their budget, in words."""
    return [
        f"{key} {value:.2e} > {limit:.0e}"
        for found, limit in ((passes, budget.one_pass), (rollout, budget.rollout))
        for key, value in found.items()
        if not value <= limit
    ]


def _ran(manifest: Manifest) -> dict[str, Any]:
    """What a large network was measured on."""
    sizes = [list(latent_hw) for latent_hw in latent_sizes(manifest)]
    return {"latents": sizes, "rollout_frames": rollout_frames(manifest)}


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
        note("time", worst_error(run_part(engine, "time", {"timestep": t}), expected))
    if "step" in worst:
        note(
            "step",
            max(
                worst_error(run_part(engine, "step", given), made)
                for given, made in step_cases(manifest, draw)
            ),
        )
    for case in checkpoint_cases(manifest, checkpoint, model):
        found = run_part(engine, case.part, case.inputs)
        note(case.part, worst_error(found, case.expected))
    context = sample_context(checkpoint, 1, SAMPLES_SEED)
    found = run_part(engine, "prompt", {"context": context})
    note("prompt", worst_error(found, flat("prompt", model.embed_prompt(context))))
    for batch in (1, 2):
        if checkpoint.table is not None:
            tokens = torch.randint(len(checkpoint.table), (batch, config.text_len), generator=draw)
            found = run_part(engine, "text", {"tokens": tokens})
            note("text", worst_error(found, {"context": checkpoint.table[tokens]}))
        for height, width in latent_sizes(manifest):
            if checkpoint.codec is None:
                continue
            size = (batch, manifest.cache.block_frames, config.in_dim, height, width)
            latents = torch.randn(size, generator=draw)
            frames = checkpoint.codec(latents)
            found = run_part(engine, "decoder", {"latents": latents})
            note("decoder", worst_error(found, {"frames": frames}))
            found = run_part(engine, "encoder", {"frames": frames})
            encoded = checkpoint.codec.encode((frames + 1) / 2)
            note("encoder", worst_error(found, {"latents": encoded}))
    return worst


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


if __name__ == "__main__":
    from export.parity_command import main

    sys.exit(main())
