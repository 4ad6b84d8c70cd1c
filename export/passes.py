"""Single passes of an engine and of torch on the very same inputs: what to feed, and what should come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from asd_rt.backends.ort import OrtEngine
from asd_rt.kv_cache import joined_mask
from asd_rt.manifest import Manifest
from asd_rt.plan import ListedPlan
from asd_rt.schedule import TRAIN_TIMESTEPS, Schedule, add_noise, flow_to_x0
from export.metrics import Array, relative_l2
from export.nonfinite import check_finite
from export.samples import latent_sizes, rollout_frames, sample_context, sample_latents
from train.checkpoint import Checkpoint
from train.model import Block, KeyValue, WanModel, make_rope

PLAN = ListedPlan((4, 2, 1))
SAMPLES_SEED = 100  # not one of calibration


def run_part(engine: OrtEngine, part: str, inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """All outputs of a part; float inputs are rounded to the dtype that the manifest names.

    Raises:
        EngineError: infinities or NaNs, and the first layer that gave some.
    """
    spec = engine.manifest.parts[part]
    feeds = {key: tensor.numpy().astype(spec.inputs[key].dtype) for key, tensor in inputs.items()}
    names = list(spec.outputs)
    found = dict(zip(names, engine.session(part).run(names, feeds), strict=True))
    check_finite(engine.path.with_name(spec.file), feeds, found)
    return found


def worst_error(found: Mapping[str, Array], expected: Mapping[str, Tensor]) -> float:
    """Largest relative L2 of all outputs."""
    return max(relative_l2(found[key], tensor.numpy()) for key, tensor in expected.items())


def flat(prefix: str, layers: Sequence[KeyValue]) -> dict[str, Tensor]:
    """Keys and values [tokens, 1, heads, D] as an engine's tensors [1, tokens, dim]."""
    return {
        f"{prefix}_{kind}.{i}": t.flatten(2).transpose(0, 1)
        for i, kv in enumerate(layers)
        for kind, t in zip("kv", kv, strict=True)
    }


def modulations(model: WanModel, timesteps: Tensor) -> Tensor:
    """What an engine's passes are modulated by at timesteps [F]: [6 * layers + 2, F, 1, dim]."""
    embedding, shared = model.embed_time(timesteps[None])
    blocks = [cast(Block, block) for block in model.blocks]
    rows = [row for block in blocks for row in (shared + block.modulation).unbind(dim=2)]
    rows += (model.head.modulation + embedding.unsqueeze(2)).unbind(dim=2)
    scales = {i for i in range(len(rows) - 2) if i % 6 in (1, 4)} | {len(rows) - 1}
    return torch.cat([row + (i in scales) for i, row in enumerate(rows)]).unsqueeze(2)


@dataclass(frozen=True)
class Case:
    """One pass of a part: its inputs, and what float32 torch makes of them."""

    part: str
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]


def denoiser_cases(
    manifest: Manifest,
    model: WanModel,
    prompt: list[KeyValue],
    clean: Tensor,
    draw: torch.Generator,
) -> Iterator[Case]:
    """Passes over empty, half-full and full caches at noisy and clean timesteps, on `clean` latents."""
    config, block = model.config, manifest.cache.block_frames
    token_hw = (clean.shape[3] // 2, clean.shape[4] // 2)

    def latents(start: int, times: Tensor) -> Tensor:
        """Frames from `start` on, as many as `times`, each as noisy as its timestep says."""
        x = clean[:, torch.arange(start, start + len(times)) % clean.shape[1]]
        sigma = (times / TRAIN_TIMESTEPS).view(-1, 1, 1, 1)
        return (1 - sigma) * x + sigma * torch.randn(x.shape, generator=draw)

    def time(frames: int, timestep: float) -> tuple[Tensor, Tensor]:
        return model.embed_time(torch.full((1, frames), timestep))

    full = rollout_frames(manifest)
    kv_dtype = getattr(torch, manifest.parts["denoiser"].inputs["past_k.0"].dtype)
    if manifest.runtime == "openvino":
        kv_dtype = torch.bfloat16
    for past_frames in sorted({0, block, (manifest.cache.window_frames or full) - block}):
        past = None
        if past_frames:
            rope = make_rope(config, range(past_frames), token_hw)
            x = latents(0, torch.zeros(past_frames))
            _, past = model.denoise(x, time(past_frames, 0.0), prompt, rope)
        else:
            empty = torch.zeros((0, 1, config.num_heads, config.head_dim))
            past = [KeyValue(empty, empty) for _ in range(config.num_layers)]
        # What the engine gets is rounded to its KV dtype; torch gets the same values.
        past, given = (
            [KeyValue(*(t.to(kv_dtype).float() for t in kv)) for kv in kvs]
            for kvs in (past, prompt)
        )
        rope = make_rope(config, range(past_frames, past_frames + block), token_hw)
        for timestep in (1000.0, 625.0, 0.0):
            x = latents(past_frames, torch.full((block,), timestep))
            flow, new = model.denoise(x, time(block, timestep), given, rope, past)
            rows = modulations(model, torch.tensor([timestep]))[:, 0, 0]
            inputs = {"latents": x, "modulation": rows}
            inputs |= {"rope_cos": rope[0], "rope_sin": rope[1]}
            held = flat("prompt", given) | flat("past", past)
            yield Case("denoiser", inputs | held, {"flow": flow} | flat("new", new))
            if "joined" not in manifest.parts or not timestep:
                continue
            both = make_rope(config, range(past_frames, past_frames + 2 * block), token_hw)
            times = torch.tensor([0.0] * block + [timestep] * block)
            x = latents(past_frames, times)
            hidden = range(block if past_frames else 0)
            mask = torch.from_numpy(
                joined_mask(block, past_frames, hidden, token_hw[0] * token_hw[1])
            )
            flow, new = model.denoise(x, model.embed_time(times[None]), given, both, past, mask)
            inputs = {"latents": x, "modulation": modulations(model, times), "mask": mask}
            inputs |= {"rope_cos": both[0], "rope_sin": both[1]}
            yield Case("joined", inputs | held, {"flow": flow} | flat("new", new))


def step_cases(
    manifest: Manifest, draw: torch.Generator
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inputs of the step part and what the runtime's own arithmetic makes of them, for all plans."""
    schedule, block = Schedule(manifest.timestep_shift), manifest.cache.block_frames
    sigmas = [[step.sigma for step in schedule.steps(count)] for count in range(1, 5)]
    pairs = {pair for levels in sigmas for pair in pairwise([*levels, 0.0])}
    for rows, columns in latent_sizes(manifest):
        shape = (1, block, manifest.model.in_dim, rows, columns)
        x, flow, noise = (torch.randn(shape, generator=draw) for _ in range(3))
        for pair in sorted(pairs):
            clean = flow_to_x0(flow.numpy(), x.numpy(), pair[0])
            made = add_noise(clean, noise.numpy(), pair[1]) if pair[1] else clean
            given = {"latents": x, "flow": flow, "noise": noise, "sigmas": torch.tensor(pair)}
            yield given, {"next": torch.from_numpy(made)}


@torch.inference_mode()
def checkpoint_cases(manifest: Manifest, checkpoint: Checkpoint, model: WanModel) -> Iterator[Case]:
    """`denoiser_cases` on videos of the student itself, at every latent size that is measured.

    A case comes right after torch ran its pass, so that hooks on `model` have seen just that.
    """
    draw = torch.Generator().manual_seed(0)
    prompt = model.embed_prompt(sample_context(checkpoint, 1, SAMPLES_SEED))
    for latent_hw in latent_sizes(manifest):
        clean = sample_latents(checkpoint, model, manifest, latent_hw, PLAN, SAMPLES_SEED)
        yield from denoiser_cases(manifest, model, prompt, clean, draw)
