"""Self-forcing rollouts: the inference loop in torch, and its last passes once more with gradients.

The loop itself runs without gradients. What a student update needs is the last denoising pass of each
block; those passes depend on each other only through cached keys and values, which carry no gradient. So
they run again as *one* forward pass over all blocks, each block seeing exactly the cached frames it saw in
the loop: same result, one graph of fixed shape. Where the mask that this takes would be large, they run one
block after another instead, which needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asd_rt.config import CacheConfig
from asd_rt.kv_cache import attended_frames
from asd_rt.schedule import Schedule, Step
from train.losses import flow_to_x0, noisy_latents
from train.model import KeyValue, WanModel, make_rope

Renoise = Callable[[int, int, Tensor], Tensor]
LARGEST_MASK = 1 << 26  # entries; the tiny world's has 4e5, Wan2.1's at 832x480 would have 2e9


@dataclass(slots=True)
class Rollout:
    """A finished rollout.

    Attributes:
        latents: x0 of every block, [B, F, C, h, w].
        last_inputs: what the last denoising pass of every block saw, [B, F, C, h, w].
        last_steps: the schedule step of that pass, one a block.
        kv: cached keys and values of all frames but the last block's, which no block sees: per layer [tokens,
            B, heads, head_dim], without layers where there is one block.
        positions: the frame index that RoPE used for each frame.
    """

    latents: Tensor
    last_inputs: Tensor
    last_steps: list[Step]
    kv: list[KeyValue]
    positions: list[int]


def frame_tokens(frames: list[int], tokens: int) -> Tensor:
    """Token indices of `frames`, int64 [len(frames) * tokens]."""
    starts = torch.tensor(frames, dtype=torch.long) * tokens
    return (starts[:, None] + torch.arange(tokens)).flatten()


@torch.no_grad()
def rollout(
    model: WanModel,
    cache: CacheConfig,
    schedule: Schedule,
    noise: Tensor,
    prompt: list[KeyValue],
    steps_per_block: list[int],
    renoise: Renoise,
    initial: Tensor | None = None,
    positions: list[int] | None = None,
) -> Rollout:
    """Generate a clip block by block.

    Args:
        model: the student.
        cache: block size, window and sinks.
        schedule: noise schedule.
        noise: first noise of all frames, [B, F, C, h, w]; F a multiple of the block size.
        prompt: from `model.embed_prompt`.
        steps_per_block: denoising steps of each block (those of initial blocks are not used).
        renoise: (block, step, like) -> fresh noise mixed in after that step.
        initial: clean latents of leading blocks, which only fill the cache.
        positions: RoPE frame index of each frame; None = 0, 1, 2, ...
    """
    frames, height, width = noise.shape[1], *noise.shape[3:]
    block_frames = cache.block_frames
    token_hw = (height // 2, width // 2)
    tokens = token_hw[0] * token_hw[1]
    positions = list(range(frames)) if positions is None else positions
    latents, last_inputs = torch.empty_like(noise), torch.zeros_like(noise)
    last_steps: list[Step] = []
    kv: list[KeyValue] = []
    times: dict[float, tuple[Tensor, Tensor]] = {}

    def time_of(timestep: float) -> tuple[Tensor, Tensor]:
        if timestep not in times:
            times[timestep] = model.embed_time(
                torch.full((1, block_frames), timestep, device=noise.device)
            )
        return times[timestep]

    for start in range(0, frames, block_frames):
        block = start // block_frames
        span = slice(start, start + block_frames)
        rope = make_rope(model.config, positions[span], token_hw, noise.device)
        past = None
        if start:
            seen = attended_frames(cache, start)
            past = _seen(kv, seen, start, tokens)
        if initial is not None and start < initial.shape[1]:
            x0 = initial[:, span]
            last_steps.append(Step(0.0, 0.0))
        else:
            x = noise[:, span]
            plan = schedule.steps(steps_per_block[block])
            for i, step in enumerate(plan):
                flow, _ = model.denoise(x, time_of(step.timestep), prompt, rope, past)
                x0 = flow_to_x0(flow.to(x.dtype), x, torch.tensor([step.sigma], device=x.device))
                if i + 1 < len(plan):
                    level = torch.tensor([plan[i + 1].sigma], device=x.device)
                    x = noisy_latents(x0, renoise(block, i, x0), level)
            last_inputs[:, span] = x
            last_steps.append(plan[-1])
        latents[:, span] = x0
        if start + block_frames == frames:
            break
        _, new = model.denoise(x0, time_of(0.0), prompt, rope, past)
        kv = (
            [
                KeyValue(torch.cat([a.k, b.k]), torch.cat([a.v, b.v]))
                for a, b in zip(kv, new, strict=True)
            ]
            if kv
            else new
        )
    return Rollout(latents, last_inputs, last_steps, kv, positions)


def _seen(kv: list[KeyValue], frames: list[int], start: int, tokens: int) -> list[KeyValue]:
    """The cached `frames` out of those before frame `start`."""
    if len(frames) == start:
        return [KeyValue(layer.k[: start * tokens], layer.v[: start * tokens]) for layer in kv]
    index = frame_tokens(frames, tokens).to(kv[0].k.device)
    return [KeyValue(layer.k[index], layer.v[index]) for layer in kv]


def attention_mask(
    cache: CacheConfig, past_frames: int, first: int, frames: int, tokens: int
) -> Tensor:
    """What the blocks of frames [first, first + frames) see: cached frames by the window, then themselves.

    Returns:
        bool [frames * tokens, (past_frames + frames) * tokens].
    """
    size = cache.block_frames
    mask = torch.zeros(frames, past_frames + frames, dtype=torch.bool)
    for begin in range(0, frames, size):
        rows = slice(begin, begin + size)
        mask[rows, attended_frames(cache, first + begin)] = True
        mask[rows, past_frames + begin : past_frames + begin + size] = True
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def last_passes(
    model: WanModel,
    cache: CacheConfig,
    done: Rollout,
    prompt: list[KeyValue],
    first: int,
    frames: int,
) -> Tensor:
    """x0 of frames [first, first + frames) of a rollout, with gradient through each block's last pass.

    Gradients reach the weights through the last pass alone: not earlier passes, not the cache.

    Returns:
        [B, frames, C, h, w], equal to `done.latents` there.
    """
    inputs = done.last_inputs[:, first : first + frames]
    size = cache.block_frames
    steps = done.last_steps[first // size : (first + frames) // size]
    device = inputs.device
    timesteps = torch.tensor([s.timestep for s in steps], device=device).repeat_interleave(size)
    sigma = torch.tensor([s.sigma for s in steps], device=device).repeat_interleave(size)[None]
    token_hw = (inputs.shape[3] // 2, inputs.shape[4] // 2)
    tokens = token_hw[0] * token_hw[1]
    positions = done.positions[first : first + frames]

    def flow_of(span: slice, past: list[KeyValue] | None, mask: Tensor | None) -> Tensor:
        time = model.embed_time(timesteps[None, span])
        rope = make_rope(model.config, positions[span], token_hw, device)
        return model.denoise(inputs[:, span], time, prompt, rope, past, mask)[0]

    cached = len(done.positions) - size
    if frames * tokens * (cached + frames) * tokens <= LARGEST_MASK:
        mask = attention_mask(cache, cached, first, frames, tokens).to(device)
        flow = flow_of(slice(0, frames), done.kv or None, mask)
    else:
        flows = []
        for begin in range(0, frames, size):
            start = first + begin
            past = _seen(done.kv, attended_frames(cache, start), start, tokens) if start else None
            flows.append(flow_of(slice(begin, begin + size), past, None))
        flow = torch.cat(flows, dim=1)
    return flow_to_x0(flow.to(inputs.dtype), inputs, sigma)
