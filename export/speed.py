"""Whether an engine is faster, on the machine that builds it, than the one it would replace."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from asd_rt.backends.base import Engine
from asd_rt.backends.ort import open_engine
from asd_rt.errors import AsdError, BackendError, EngineError
from asd_rt.manifest import Manifest, read_manifest, verify
from asd_rt.planner import is_large
from asd_rt.schedule import Schedule
from export.samples import latent_sizes, rollout_frames

BUDGET_S, MOST_ROUNDS, LEAST_ROUNDS = 2.0, 40, 3
FLOATS = ("fp32", "bf16")  # what an engine may replace on a CPU, best first
CARD_FLOATS = ("fp16", "bf16")  # and on a card
log = logging.getLogger(__name__)


def replaced_engine(folder: Path, manifest: Manifest) -> tuple[Path, Manifest] | None:
    """The float engine of the same student in `folder` that `manifest`'s would take the place of."""
    on_card = manifest.backend != "onnx"
    for precision in CARD_FLOATS if on_card else FLOATS:
        if manifest.precision == precision:
            return None
        path = folder / f"asd_{precision}.{'plan' if on_card else 'onnx'}"
        if not path.exists():
            continue
        try:
            found = read_manifest(path)
            verify(path, found)
        except AsdError as error:
            log.info("  speed     not compared: %s", error)
            return None
        same = ("checkpoint", "cache", "latent_hw", "backend")
        if all(getattr(found, name) == getattr(manifest, name) for name in same):
            return path, found
    return None


def measure_speed(path: Path, manifest: Manifest, folder: Path) -> dict[str, Any] | None:
    """ms of a pass behind a full window, in turns with the engine it would replace; says which is faster.

    Args:
        path: an engine that is not in its place yet; a plan is measured where its card is.
        manifest: of it.
        folder: where it goes.

    Returns:
        figures for the manifest; None where nothing is replaced, or the network is too large to hold two.
    """
    other = replaced_engine(folder, manifest)
    if other is None:
        return None
    if is_large(manifest.model):
        log.info("  speed     not compared: a network of this size is not held twice; "
                 "python -m benchmarks.compare does it")  # fmt: skip
        return None
    with ExitStack() as stack:
        try:
            engines = [_opened(stack, path, manifest), _opened(stack, *other)]
        except (BackendError, EngineError) as error:
            log.info("  speed     not compared: %s", error)
            return None
        ours, theirs = _in_turns([_pass(engine) for engine in engines])
    ratio = ours / theirs
    verdict = "" if ratio < 1 else ": it is not faster"
    log.info("  speed     %s takes %.2f times as long as %s here, %.2f ms a pass against %.2f%s",
             path.name, ratio, other[0].name, ours, theirs, verdict)  # fmt: skip
    return {
        "ms_a_pass": round(ours, 3),
        "against": other[0].name,
        "its_ms_a_pass": round(theirs, 3),
        "times_as_long": round(ratio, 3),
    }


def _opened(stack: ExitStack, path: Path, manifest: Manifest) -> Engine:
    """An engine, closed in the end; the parts that are added to it later are not needed."""
    engine: Engine
    if manifest.backend == "onnx":
        engine = open_engine(path, manifest)
    else:
        from asd_rt.backends.tensorrt import open_engine as open_plan

        engine = open_plan(path, manifest)
    stack.callback(engine.close)
    return engine


def _pass(engine: Engine) -> Callable[[], object]:
    """One denoising pass behind a full window, or behind what a build's rollout is long."""
    manifest, denoiser = engine.manifest, engine.denoiser
    block, model = manifest.cache.block_frames, manifest.model
    past = (manifest.cache.window_frames or rollout_frames(manifest)) - block
    latent_hw = latent_sizes(manifest)[0]
    denoiser.prepare(1, latent_hw, past + block)
    denoiser.set_prompt(np.zeros((1, model.text_len, model.text_dim), np.float32))
    x = np.zeros((1, block, model.in_dim, *latent_hw), np.float32)
    timestep = Schedule(manifest.timestep_shift).steps(1)[0].timestep
    return lambda: denoiser.denoise(x, timestep, range(past, past + block), past)


def _in_turns(passes: list[Callable[[], object]]) -> list[float]:
    """Median ms of each, after one run that does not count."""
    for run in passes:
        run()
    found: list[list[float]] = [[] for _ in passes]
    end = perf_counter() + BUDGET_S
    for count in range(MOST_ROUNDS):
        if count >= LEAST_ROUNDS and perf_counter() > end:
            break
        for run, taken in zip(passes, found, strict=True):
            begin = perf_counter()
            run()
            taken.append((perf_counter() - begin) * 1e3)
    return [median(taken) for taken in found]
