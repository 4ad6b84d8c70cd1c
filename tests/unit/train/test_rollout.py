"""The training rollout is the inference loop, and gradients flow through last passes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from asd_rt.config import CacheConfig
from asd_rt.frame_loop import FrameLoop, Request
from asd_rt.plan import ListedPlan
from asd_rt.schedule import Schedule
from export.reference import TorchDenoiser
from train.model import WanModel
from train.rollout import attention_mask, last_passes, rollout

CACHES = [
    CacheConfig(block_frames=3),
    CacheConfig(block_frames=3, window_frames=7, sink_frames=2),
    CacheConfig(block_frames=1, window_frames=4, sink_frames=1),
]
SCHEDULE = Schedule(5.0)


def noise_of(block: int, step: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(100 * block + step)
    return torch.randn(like.shape, generator=generator)


@pytest.mark.parametrize(
    "cache", CACHES, ids=lambda c: f"block{c.block_frames}-window{c.window_frames}"
)
def test_rollout_equals_the_runtime_loop_and_its_last_passes(
    model: WanModel, cache: CacheConfig
) -> None:
    blocks = 4
    frames = blocks * cache.block_frames
    noise = torch.randn(2, frames, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    context = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    plan = [4, 1, 2, 1]
    with torch.no_grad():
        prompt = model.embed_prompt(context)
    done = rollout(model, cache, SCHEDULE, noise, prompt, plan, noise_of)

    like = torch.empty(2, cache.block_frames, 4, 4, 6)
    renoise = {
        (b, s): noise_of(b, s, like).numpy() for b in range(blocks) for s in range(plan[b] - 1)
    }
    request = Request(
        context=context.numpy(),
        shape=(2, frames, 4, 4, 6),
        plan=ListedPlan(tuple(plan)),
        noise=noise.numpy(),
        renoise=renoise,
    )
    loop = FrameLoop(TorchDenoiser(model), cache, SCHEDULE, request, model.config.text_len)
    latents = np.concatenate([block.latents for block in loop], axis=1)
    error = np.linalg.norm(latents - done.latents.numpy()) / np.linalg.norm(latents)
    assert error < 1e-5

    again = last_passes(model, cache, done, model.embed_prompt(context), 0, frames)
    assert ((again - done.latents).norm() / done.latents.norm()).item() < 1e-5
    part = last_passes(
        model, cache, done, model.embed_prompt(context), cache.block_frames, 2 * cache.block_frames
    )
    expected = done.latents[:, cache.block_frames : 3 * cache.block_frames]
    assert ((part - expected).norm() / expected.norm()).item() < 1e-5


def test_gradient_stays_inside_its_block(model: WanModel) -> None:
    """A later block's result depends on an earlier block's only through the cache, which has no gradient."""
    cache = CACHES[0]
    noise = torch.randn(1, 6, 4, 4, 4)
    prompt = model.embed_prompt(torch.randn(1, 5, 8))
    done = rollout(model, cache, SCHEDULE, noise, prompt, [1, 1], noise_of)
    assert not done.latents.requires_grad
    assert all(not kv.k.requires_grad for kv in done.kv)
    done.last_inputs.requires_grad_(True)
    x = last_passes(model, cache, done, model.embed_prompt(torch.randn(1, 5, 8)), 0, 6)
    x[:, 3:].sum().backward()
    grad = done.last_inputs.grad
    assert grad is not None
    assert grad[:, :3].abs().max() == 0
    assert grad[:, 3:].abs().max() > 0
    assert model.blocks[0].ffn[0].weight.grad is not None


def test_initial_blocks_are_kept_as_they_are(model: WanModel) -> None:
    cache = CACHES[0]
    noise, initial = torch.randn(1, 6, 4, 4, 4), torch.randn(1, 3, 4, 4, 4)
    prompt = model.embed_prompt(torch.randn(1, 5, 8))
    done = rollout(model, cache, SCHEDULE, noise, prompt, [4, 1], noise_of, initial=initial)
    torch.testing.assert_close(done.latents[:, :3], initial)


def test_mask_shows_the_window_and_the_own_block() -> None:
    cache = CacheConfig(block_frames=2, window_frames=5, sink_frames=1)
    mask = attention_mask(cache, past_frames=8, first=4, frames=4, tokens=1)
    rows = [sorted(torch.nonzero(row).flatten().tolist()) for row in mask]
    assert rows[0] == rows[1] == [0, 2, 3, 8, 9]
    assert rows[2] == rows[3] == [0, 4, 5, 10, 11]


@pytest.mark.parametrize("plan", [[2], [4, 1, 2]], ids=str)
def test_keys_that_no_block_sees_are_not_made(
    model: WanModel, monkeypatch: pytest.MonkeyPatch, plan: list[int]
) -> None:
    cache, frames = CACHES[0], 3 * len(plan)
    noise = torch.randn(1, frames, 4, 4, 4)
    prompt = model.embed_prompt(torch.randn(1, 5, 8))
    passes, denoise = [], model.denoise

    def counted(*arguments, **named):
        passes.append(arguments)
        return denoise(*arguments, **named)

    monkeypatch.setattr(model, "denoise", counted)
    done = rollout(model, cache, SCHEDULE, noise, prompt, plan, noise_of)
    assert len(passes) == sum(plan) + len(plan) - 1
    tokens = (frames - cache.block_frames) * 4
    assert [len(layer.k) for layer in done.kv] == [tokens] * (len(model.blocks) if tokens else 0)
    torch.testing.assert_close(last_passes(model, cache, done, prompt, 0, frames), done.latents)
