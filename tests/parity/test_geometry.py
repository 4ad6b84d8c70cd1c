"""Other dims, heads, shifts, windows, sinks and batches: torch, ONNX and a naive loop agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asd_rt.backends.base import open_backend
from asd_rt.config import ModelConfig
from asd_rt.plan import FixedPlan, ListedPlan
from asd_rt.session import Replay, Session
from export.engine import Target, build_engine
from export.reference import TorchEngine
from export.settings import Overrides, resolve
from train.checkpoint import load_checkpoint, save_checkpoint
from train.deployment import Deployment
from train.model import WanModel

Compare = Callable[[NDArray[Any], NDArray[Any]], float]


@dataclass(frozen=True)
class Case:
    """One network, cache and video."""

    name: str
    dim: int
    heads: int
    layers: int
    block: int
    window: int
    sink: int
    shift: float
    batch: int
    latent_hw: tuple[int, int]
    steps: tuple[int, ...]
    fixed_size: bool = False
    precision: str = "fp32"
    tolerance: float = 1e-4


CASES = (
    Case("rolling_batch3", 36, 3, 1, 2, 7, 1, 3.0, 3, (2, 4), (2, 1, 3, 1, 2, 1)),
    Case("sink_across_blocks", 32, 2, 3, 3, 8, 2, 8.0, 1, (6, 4), (4, 1, 1, 2, 1), fixed_size=True),
    Case("smallest_heads_no_window", 18, 3, 2, 1, 0, 0, 1.0, 2, (2, 2), (1, 4, 2)),
    Case("window_of_one_block", 24, 1, 2, 2, 2, 0, 5.0, 1, (4, 2), (2, 2, 2)),
    Case("half", 48, 3, 2, 3, 9, 3, 5.0, 2, (4, 6), (4, 1, 1, 1), precision="fp16", tolerance=5e-2),
)


def make_checkpoint(case: Case, folder: Path) -> None:
    config = ModelConfig(
        dim=case.dim,
        ffn_dim=2 * case.dim + 6,
        freq_dim=10,
        text_dim=7,
        text_len=5,
        in_dim=3,
        out_dim=3,
        num_heads=case.heads,
        num_layers=case.layers,
    )
    torch.manual_seed(len(case.name))
    model = WanModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    size = case.latent_hw if case.fixed_size else None
    deployment = Deployment(case.block, case.window, case.sink, case.shift, size)
    save_checkpoint(folder, config, model.state_dict(), deployment)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_loops_agree(
    case: Case, relative_l2: Compare, naive_loop: Any, tmp_path: Path
) -> None:
    make_checkpoint(case, tmp_path / "student")
    checkpoint = load_checkpoint(tmp_path / "student")
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    engine = open_backend(
        build_engine(checkpoint, settings, Target("onnx", case.precision), tmp_path, force=False)
    )
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    frames = len(case.steps) * case.block
    noise = draw(case.batch, frames, 3, *case.latent_hw)
    context = draw(case.batch, 4, 7)
    renoise = {
        (block, step): draw(case.batch, case.block, 3, *case.latent_hw)
        for block, count in enumerate(case.steps)
        for step in range(count - 1)
    }
    plan = ListedPlan(case.steps)

    def play(session: Session) -> Replay:
        return session.replay(noise, context, renoise=renoise, plan=plan, dump_cache=True)

    found = play(Session(engine))
    reference = play(Session(TorchEngine(checkpoint, engine.manifest)))
    loop = naive_loop(checkpoint.build_model(), case.block, case.window, case.sink, case.shift)
    latents, cache = loop.run(noise, context, list(case.steps), renoise)
    assert relative_l2(reference.latents, latents) < 1e-5
    assert relative_l2(found.latents, latents) < case.tolerance
    for layer, pair in enumerate(cache):
        for kind, expected in zip("kv", pair, strict=True):
            name = f"kv_cache.layer{layer}.{kind}"
            assert relative_l2(reference.cache[name], expected) < 1e-5
            assert relative_l2(found.cache[name], expected) < case.tolerance
