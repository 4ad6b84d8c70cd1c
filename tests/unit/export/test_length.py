"""Length has no limit: 1,100 latent frames, past the 1,024 of the reference's position table."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import asd_rt
from asd_rt.manifest import read_manifest
from asd_rt.noise import gaussian
from asd_rt.plan import FixedPlan
from asd_rt.session import Session
from export.reference import TorchEngine
from train.checkpoint import load_checkpoint

FRAMES = 1100


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_time_and_memory_are_flat(built: Path) -> None:
    with asd_rt.open(built / "asd_fp32.onnx", threads=1) as session:
        cache = session.manifest.cache
        assert cache.window_frames < FRAMES
        assert cache.sink_frames
        ms, resident = [], []
        for block in session.generate("red", frames=FRAMES, steps=1, first_steps=1):
            ms.append(block.denoise_ms)
            resident.append(resident_bytes())
    assert len(ms) * cache.block_frames == FRAMES
    # From where the window is full. The fastest blocks of each end: what else runs here is no slope.
    full = 50
    early, late = np.sort(ms[full : full + 200])[:50].mean(), np.sort(ms[-200:])[:50].mean()
    assert late < 1.5 * early
    assert resident[-1] - resident[full] < 4 << 20


def test_the_end_of_a_long_video_is_what_torch_makes_of_it(built: Path, student: Path) -> None:
    path = built / "asd_fp32.onnx"
    manifest = read_manifest(path)
    model, (rows, columns) = manifest.model, manifest.latent_hw or (0, 0)
    noise = np.random.default_rng(0).standard_normal((1, FRAMES, model.in_dim, rows, columns))
    context = gaussian((1, model.text_len, model.text_dim), 0, 0, 0)
    checkpoint = load_checkpoint(student)

    def end(session: Session) -> np.ndarray:
        played = session.replay(noise.astype(np.float32), context, plan=FixedPlan(1, 1))
        return played.latents[:, 1024:]

    with asd_rt.open(path, threads=1) as session:
        found = end(session)
    expected = end(Session(TorchEngine(checkpoint, manifest), join=False))
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
