"""Where a distillation step's gradients go, and that they are derivatives: finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asd_rt.config import CacheConfig
from asd_rt.schedule import Schedule
from tests.unit.train.toy import toy_start, toy_toml
from train import distill
from train.config import load_config
from train.distill import DistillStage
from train.losses import (
    asd_discriminator_loss,
    asd_generator_loss,
    dmd_loss,
    finite_difference_penalty,
    flow_matching_loss,
)
from train.model import WanModel
from train.pipeline import World, _make_stage
from train.rollout import last_passes, rollout

Loss = Callable[[Tensor], Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A, B, C = draw(1, 40), draw(2, 40), draw(3, 40)
LOSSES: dict[str, Loss] = {
    "flow matching": lambda x: flow_matching_loss(x, A, B),
    "ASD generator, fake": lambda x: asd_generator_loss(x, A),
    "ASD discriminator, fake": lambda x: asd_discriminator_loss(x, A),
    "ASD discriminator, real": lambda x: asd_discriminator_loss(A, x),
    "penalty, still": lambda x: finite_difference_penalty(x, A),
    "penalty, shaken": lambda x: finite_difference_penalty(A, x),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_gradients_of_finite_differences(name: str) -> None:
    loss, step = LOSSES[name], 1e-2
    for direction in (A, B + 0.5 * A):
        x = C.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x)
        with torch.no_grad():
            up, down = loss(C + step * direction), loss(C - step * direction)
        found = (up - down).double() / (2 * step)
        assert (gradient @ direction).item() == pytest.approx(found.item(), rel=2e-3, abs=1e-4)


def test_the_dmd_loss_descends_the_given_gradient_to_second_order() -> None:
    """Its target stays where it was: the loss of x + d is |gradient + d|^2 / (2 numel)."""
    x = draw(4, 2, 3, 4).requires_grad_()
    gradient = draw(5, 2, 3, 4)
    loss = dmd_loss(x, gradient)
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-5)
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, gradient / gradient.numel())


def test_last_passes_have_the_derivative_with_cache_and_inputs_fixed(model: WanModel) -> None:
    """Over all weights at once: nothing but the last pass of each block moves. (Norms are float32.)"""
    model = model.double()
    cache, schedule = CacheConfig(block_frames=3, window_frames=6, sink_frames=3), Schedule(5.0)
    noise, context = draw(6, 1, 9, 4, 4, 4).double(), draw(7, 1, 5, 8).double()
    weights = draw(8, 1, 9, 4, 4, 4).double()
    with torch.no_grad():
        prompt = model.embed_prompt(context)

    def fresh(block: int, step: int, like: Tensor) -> Tensor:
        return draw(100 + 10 * block + step, *like.shape).double()

    done = rollout(model, cache, schedule, noise, prompt, [2, 1, 3], fresh)

    def value() -> Tensor:
        x = last_passes(model, cache, done, model.embed_prompt(context), 0, 9)
        return (x * weights).sum()

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value(), parameters)
    length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    directions = [
        g / length + 0.01 * draw(200 + i, *g.shape).double() for i, g in enumerate(gradients)
    ]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step, values = 1e-3, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(value())
    found = (values[0] - values[1]) / (2 * step)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def toy_stage(folder: Path) -> DistillStage:
    """The recipe's distillation at toy size, at its beginning."""
    toml = toy_toml(folder)
    toy_start(folder, toml)
    config = load_config(toml)
    folders = {name: folder / name for name in ("teacher", "init")}
    stage = _make_stage("distill", World(config, folder, 0, folders))
    assert isinstance(stage, DistillStage)
    stage.selection = None
    return stage


def test_a_students_update_reaches_the_student_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the teacher, the critic, the discriminator, an (n+1)-step target or a cached key."""
    stage = toy_stage(tmp_path)
    networks = stage.networks
    others = [*networks.critic.parameters(), *networks.discriminator.parameters()]
    rollouts, checked = [], []
    make, apply = stage._rollout, distill._Pulls.apply

    def watched_rollout(*arguments):
        rollouts.append(make(*arguments))
        return rollouts[-1]

    def watched_apply(pulls) -> None:
        before = [None if p.grad is None else p.grad.clone() for p in others]
        apply(pulls)
        for parameter, grad in zip(others, before, strict=True):
            if grad is None:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, grad)
        assert all(p.grad is None for p in networks.critic.parameters())
        assert all(p.grad is not None for p in networks.student.parameters())
        checked.append(pulls)

    monkeypatch.setattr(distill._Pulls, "apply", watched_apply)
    stage._rollout = watched_rollout
    for index in range(1, 5):
        stage.step(index)
    assert len(checked) == 4 and len(rollouts) > 4  # some steps had a target
    assert not any(p.requires_grad for p in networks.teacher.parameters())
    for done in rollouts:
        tensors = [done.latents, done.last_inputs, *(x for kv in done.kv for x in kv)]
        assert not any(x.requires_grad or x.grad_fn is not None for x in tensors)


@pytest.mark.parametrize("separation", [0.0, 0.5])
@pytest.mark.parametrize(
    ("weights", "passes"),
    [((1.0, 0.0, 0.0, 0.0), 4), ((0.0, 0.0, 0.0, 1.0), 2)],
    ids=["asd", "n=4"],
)
def test_dmd_and_asd_share_the_teachers_pass_over_a_clip(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: tuple[float, ...],
    passes: int,
    separation: float,
) -> None:
    """With and without the prompt for DMD; for ASD further the (n+1)-step clip, and both shaken.

    The one that ASD pushes through keeps its graph, if ASD pushes at all.
    """
    stage = toy_stage(tmp_path)
    settings = replace(stage.config.distill, step_weights=weights, asd_warmup=0)
    stage.config = replace(stage.config, distill=settings)
    stage.separation = dict.fromkeys(stage.separation, separation)
    teacher, clips, graphs = stage.networks.teacher, [], []
    denoise = teacher.denoise

    def counted(latents: Tensor, *arguments, **named):
        clips.append(len(latents) // settings.batch)
        graphs.append(torch.is_grad_enabled())
        return denoise(latents, *arguments, **named)

    monkeypatch.setattr(teacher, "denoise", counted)
    stage.step(0)
    assert sorted(clips) == [1, 1, 1, 2][:passes]
    assert sum(graphs) == (1 if passes == 4 and separation else 0)


def test_asd_counts_as_far_as_its_discriminator_tells_clips_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By norms alone, a discriminator that tells nothing apart would push as strongly as DMD pulls."""
    stage = toy_stage(tmp_path)
    assert set(stage.separation) == {"1", "1*", "2", "2*", "3", "3*"}
    student = list(stage.networks.student.parameters())
    seen: list[float] = []
    apply = distill._Pulls.apply

    def watched_apply(pulls) -> None:
        ((x, pull, push),) = pulls._waiting
        wanted = pull
        if push is not None:
            wanted = pull + pulls.ratio * pull.norm() / push.norm() * push
        grads = torch.autograd.grad((x * wanted).sum(), student, retain_graph=True)
        apply(pulls)
        for parameter, grad in zip(student, grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        seen.append(pulls.ratio)
        assert (push is None) == (pulls.ratio == 0)

    monkeypatch.setattr(distill._Pulls, "apply", watched_apply)
    for separation in (-0.5, 0.0, 0.5):
        for index in range(1, 5):
            stage.separation = dict.fromkeys(stage.separation, separation)
            figures = stage.step(index)
            plan = f"{figures['n']:.0f}" + "*" * int(figures["enhanced"])
            expected = dict.fromkeys(stage.separation, separation)
            if "apart" in figures:
                expected[plan] += 0.1 * (figures["apart"] - separation)
            assert stage.separation == pytest.approx(expected)
    assert set(seen[:8]) == {0.0}
    assert set(seen[8:]) <= {0.0, 0.5 * stage.config.distill.asd_ratio} and max(seen[8:]) > 0
