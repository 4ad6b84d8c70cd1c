"""What ranking and choosing layers may cost: few passes, spread over the rollouts, and no more than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asd_rt.manifest import Manifest
from export import calibrate, simulate
from export.calibrate import choose_scheme
from export.engine import NO_PARTS
from export.quantize import LAYERS
from export.reference import TorchDenoiser
from export.rollouts import count_passes, play_rollouts
from export.settings import FixedPlan, Overrides, make_manifest, resolve
from export.simulate import Compared, OverBudgetError, Ranked, Simulated, layers_of
from train.checkpoint import Checkpoint, load_checkpoint


@pytest.fixture
def checkpoint(student: Path) -> Checkpoint:
    return load_checkpoint(student)


@pytest.fixture
def manifest(checkpoint: Checkpoint) -> Manifest:
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    return make_manifest(checkpoint, settings, "int8", "onnx", NO_PARTS)


@pytest.fixture
def timesteps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of every pass through torch, whoever asks for it."""
    seen: list[float] = []
    run = TorchDenoiser._pass

    def noted(self: Any, latents: Any, times: torch.Tensor, *more: Any) -> Any:
        seen.append(float(times[0, 0]))
        return run(self, latents, times, *more)

    monkeypatch.setattr(TorchDenoiser, "_pass", noted)
    return seen


def test_passes_are_counted(
    checkpoint: Checkpoint, manifest: Manifest, timesteps: list[float]
) -> None:
    play_rollouts(checkpoint, manifest, TorchDenoiser(checkpoint.build_model()), "test", 0)
    clean = timesteps.count(0.0)
    assert count_passes(manifest) == (len(timesteps) - clean, clean)


def test_single_layers_are_tried_on_few_passes_of_both_kinds(
    checkpoint: Checkpoint,
    manifest: Manifest,
    timesteps: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulate, "RANKED_RUNS", 48)
    model, total = checkpoint.build_model(), count_passes(manifest)
    layers = layers_of(model)
    for layer in layers:
        layer.scale = 0.05
    with Simulated(layers) as simulated:
        play_rollouts(checkpoint, manifest, Ranked(model, simulated, total), "test", 0)
    tried = len(timesteps) - sum(total)
    assert tried == 48 == 4 * 2 * len(LAYERS)  # 4 passes, two levels a layer
    assert timesteps.count(0.0) - total[1] == 24
    assert all(error > 0 for layer in layers for error in layer.errors.values())


def test_a_rollout_ends_with_the_first_pass_over_budget(
    checkpoint: Checkpoint, manifest: Manifest, timesteps: list[float]
) -> None:
    model = checkpoint.build_model()
    layers = layers_of(model)
    for layer in layers:
        layer.scale = 1.0  # far too coarse
    with Simulated(layers) as simulated:
        compared = Compared(model, simulated, dict.fromkeys(layers, "int8"), limit=1e-6)
        with pytest.raises(OverBudgetError):
            play_rollouts(checkpoint, manifest, compared, "test", 0)
    assert compared.worst > 1e-6 and len(timesteps) <= 2


def test_what_is_not_finite_is_over_any_budget(checkpoint: Checkpoint) -> None:
    model = checkpoint.build_model()
    with Simulated([]) as simulated:
        compared = Compared(model, simulated, {}, limit=10.0)
        with pytest.raises(OverBudgetError):
            compared._note(float("nan"))
    assert compared.worst == np.inf


def test_the_choice_holds_its_budget_over_all_rollouts(
    checkpoint: Checkpoint, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few passes the ranking saw, and however weights are held while it looks."""
    model, schemes, budget = checkpoint.build_model(), [], 3e-3
    for large in (False, True):
        monkeypatch.setattr(calibrate, "is_large", lambda config, large=large: large)
        schemes.append(choose_scheme(checkpoint, model, manifest, budget))
    assert schemes[0].to_json() == schemes[1].to_json()
    assert 0 < schemes[0].figures["simulated_pass"] <= budget
    assert schemes[0].weight_only or schemes[0].kept


@pytest.mark.parametrize("least", [1, 2, 17, 18, 40, 71, 72])
@pytest.mark.parametrize("guess", [1, 18, 60, 72])
def test_the_search_finds_the_fewest(least: int, guess: int) -> None:
    tried: list[int] = []

    def holds(count: int) -> bool:
        tried.append(count)
        return count >= least

    assert calibrate.fewest(72, guess, holds) == least
    assert len(tried) == len(set(tried)) <= 12
    if abs(guess - least) <= 1:
        assert len(tried) <= 4
    assert 72 not in tried  # nothing is eight bits then, so that there is nothing to measure
