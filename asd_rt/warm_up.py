"""What a block costs here, measured before the first deadline: every size of pass once, and decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter

import numpy as np

from asd_rt.backends.base import Engine
from asd_rt.costs import CostModel, Kind
from asd_rt.decoding import Decoder
from asd_rt.schedule import Schedule

BUDGET_S = 2.0  # what is not measured by then is estimated from what was


def learn_costs(
    engine: Engine,
    costs: CostModel,
    shape: tuple[int, int, int, int, int],
    join: bool,
    decoder: Decoder | None,
) -> None:
    """Run the passes that a video of `shape` [B, F, C, h, w] will run, on zeros, and tell `costs`.

    Each runs twice: the first time binds buffers and is not counted.
    """
    manifest, denoiser = engine.manifest, engine.denoiser
    batch, frames, channels, rows, columns = shape
    cache, model = manifest.cache, manifest.model
    size = cache.block_frames
    longest = (cache.window_frames or frames) - size
    denoiser.prepare(batch, (rows, columns), longest + size * (2 if join else 1))
    denoiser.set_prompt(np.zeros((batch, model.text_len, model.text_dim), np.float32))
    x = np.zeros((batch, size, channels, rows, columns), np.float32)
    timestep = Schedule(manifest.timestep_shift).steps(1)[0].timestep
    end = perf_counter() + BUDGET_S

    def run(kind: Kind, past: int, work: Callable[[], object]) -> None:
        if perf_counter() < end:
            work()
            begin = perf_counter()
            work()
            costs.observe(kind, past, (perf_counter() - begin) * 1e3)

    # The full window first: that is what most of a video runs at.
    for past in range(longest, -1, -size):
        own = range(past, past + size)
        run("pass", past, partial(denoiser.denoise, x, timestep, own, past))
        if not join:
            run("cache", past, partial(denoiser.denoise, x, 0.0, own, past))
            continue
        # A joined pass counts under the past of the block that it begins.
        then = min(past + size, longest)
        both, hidden = range(past, past + 2 * size), range(past + size - then)
        run("joined", then, partial(denoiser.denoise_joined, x, x, timestep, both, past, hidden))
    if decoder is not None:
        run("decode", 0, partial(decoder.decode, x))
