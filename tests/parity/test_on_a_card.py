"""Engines on a real NVIDIA card against the packaged engine on the CPU. Skipped where there is no driver."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import asd_rt
from asd_rt.backends.ort_cuda import is_available
from asd_rt.plan import ListedPlan
from asd_rt.session import Session
from export.build import main
from export.metrics import relative_l2

pytestmark = pytest.mark.gpu
PROMPT = "a red three moving right"


@pytest.fixture(scope="module")
def cpu(root: Path) -> Session:
    return asd_rt.open(root / "asd_rt" / "engine" / "asd_fp32.onnx", device="cpu", join=False)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped student for the card that is here."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("plans")
    words = ["--steps", "1", "--target", "tensorrt", "--precision", "fp16", "--out", str(out)]
    assert main(words) == 0
    return out / "asd_fp16.plan"


def same_latents(found: Session, expected: Session, bound: float) -> None:
    """The same noise through both, past the end of the window, the cache included."""
    model, cache = expected.manifest.model, expected.manifest.cache
    draw = np.random.default_rng(0)
    frames = cache.window_frames + 2 * cache.block_frames
    size = (1, frames, model.in_dim, *(expected.manifest.latent_hw or (8, 8)))
    noise = draw.standard_normal(size).astype(np.float32)
    one, other = (
        s.replay(noise, s.context(PROMPT), plan=ListedPlan((4, 2, 1)), dump_cache=True)
        for s in (found, expected)
    )
    assert relative_l2(one.latents, other.latents) < bound
    assert max(relative_l2(one.cache[k], other.cache[k]) for k in other.cache) < bound


def same_video(found: Session, expected: Session, bound: float) -> None:
    """Blocks that are queued whole show what passes one by one do; a part of the cache pass is hidden."""
    videos = [list(s.generate(PROMPT, frames=12, seed=1)) for s in (found, expected)]
    for one, other in zip(*videos, strict=True):
        assert one.frames is not None and other.frames is not None
        assert relative_l2(one.latents, other.latents) < bound
        assert np.abs(one.frames.astype(float) - other.frames).mean() < 255 * bound
    for block in videos[0][:-1]:
        assert block.cache_ms is not None and 0 <= block.hidden_ms <= block.cache_ms


def test_a_plan(plan: Path, cpu: Session) -> None:
    with asd_rt.open(plan) as session:
        same_latents(session, cpu, 5e-2)
        for _ in range(3):  # run, captured, replayed
            same_video(session, cpu, 5e-2)


def test_onnx_runtime(root: Path, cpu: Session) -> None:
    if not is_available():
        pytest.skip("this onnxruntime has no CUDA: pip install 'asd-rt[gpu]'")
    with asd_rt.open(root / "asd_rt" / "engine" / "asd_fp32.onnx", device="cuda") as session:
        same_latents(session, cpu, 1e-3)
        same_video(session, cpu, 1e-3)
