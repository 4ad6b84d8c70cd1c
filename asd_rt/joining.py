"""Whether a joined pass is faster here than the two passes it replaces: measured once, then remembered.

Both ways give the same video but for rounding. So that the same seed gives the very same bits in every run on
a machine, the answer is kept on disk, by engine and device, and not measured again. Where it cannot be kept,
passes stay separate: a measurement could come out otherwise the next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from time import perf_counter

import numpy as np

from asd_rt.backends.base import Denoiser, Engine
from asd_rt.errors import OutputError
from asd_rt.files import cache_folder, replacing
from asd_rt.manifest import Manifest
from asd_rt.schedule import Schedule

MIN_GAIN = 1.02  # below it, separate passes: they keep less memory
REPEATS = 5
BUDGET_S = 5.0  # large engines are measured once instead of several times
_log = logging.getLogger(__name__)


def joining_is_faster(engine: Engine, shape: tuple[int, int, int, int, int]) -> bool:
    """The remembered answer for videos of `shape` [B, F, C, h, w], or a measured one.

    Of the shape, batch and latent size matter; passes are measured over a full window, or over one block
    where there is no window.
    """
    manifest = engine.manifest
    if not engine.denoiser.can_join:
        return False
    key = f"{engine.device}, batch {shape[0]}, latents {shape[3]}x{shape[4]}"
    file = _file(manifest)
    if file is None:
        return False
    known = _read(file)
    if key not in known:
        separate, joined = measure(engine.denoiser, manifest, shape)
        _log.info("two passes %.2f ms, joined %.2f ms", separate * 1e3, joined * 1e3)
        known[key] = {"separate_ms": separate * 1e3, "joined_ms": joined * 1e3}
        if not _write(file, known):
            return False
    return known[key]["separate_ms"] > MIN_GAIN * known[key]["joined_ms"]


def measure(
    denoiser: Denoiser, manifest: Manifest, shape: tuple[int, int, int, int, int]
) -> tuple[float, float]:
    """Best durations in seconds of a cache pass and a first pass one by one, and of both joined."""
    cache, (batch, _, channels, rows, columns) = manifest.cache, shape
    size = cache.block_frames
    past = max(0, cache.window_frames - size) if cache.window_frames else size
    denoiser.prepare(batch, (rows, columns), past + 2 * size)
    model = manifest.model
    denoiser.set_prompt(np.zeros((batch, model.text_len, model.text_dim), np.float32))
    x = np.zeros((batch, size, channels, rows, columns), np.float32)
    timestep = Schedule(manifest.timestep_shift).steps(1)[0].timestep
    first, both = range(past, past + size), range(past, past + 2 * size)
    hidden = range(min(size, past)) if cache.window_frames else range(0)

    def separate() -> None:
        denoiser.denoise(x, 0.0, first, past)
        denoiser.denoise(x, timestep, first, past)

    def joined() -> None:
        denoiser.denoise_joined(x, x, timestep, both, past, hidden)

    ways = (separate, joined)
    for way in ways:
        way()  # binds, and computes modulations
    best = [float("inf")] * 2
    begin = perf_counter()
    for _ in range(REPEATS):
        for i, way in enumerate(ways):
            start = perf_counter()
            way()
            best[i] = min(best[i], perf_counter() - start)
        if perf_counter() - begin > BUDGET_S:
            break
    return best[0], best[1]


def _file(manifest: Manifest) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    parts = "".join(manifest.parts[name].sha256 for name in ("denoiser", "joined"))
    return folder / f"joining-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> dict[str, dict[str, float]]:
    """What is remembered; nothing where the file is absent or not ours to read."""
    try:
        found = json.loads(file.read_text())
        return {
            key: {name: float(entry[name]) for name in ("separate_ms", "joined_ms")}
            for key, entry in found.items()
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _write(file: Path, known: dict[str, dict[str, float]]) -> bool:
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n")
    except OutputError as error:
        _log.warning("passes are not joined, for that choice cannot be kept: %s", error)
        return False
    return True
