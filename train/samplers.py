"""Subjects of an evaluation: students in torch, engines, and the many-step teacher, on the same noise.

All noise is the runtime's own (`asd_rt.noise`), keyed by seed, block and step: a student in torch and an
engine built from it start from the same values, and so does the teacher, which takes all blocks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from asd_rt.config import CacheConfig, ModelConfig
from asd_rt.decoding import Decoder
from asd_rt.errors import CheckpointError, EngineError
from asd_rt.manifest import read_manifest
from asd_rt.noise import gaussian
from asd_rt.plan import FixedPlan
from asd_rt.schedule import TRAIN_TIMESTEPS, Schedule
from asd_rt.session import open_session
from train.checkpoint import Checkpoint, load_checkpoint
from train.codec import LATENT_HW, LinearCodec, is_tiny_world
from train.judge import BATCH
from train.losses import guided_x0, shifted_sigma
from train.model import WanModel
from train.precision import mixed_precision
from train.rollout import rollout
from train.tiny_world import NEGATIVE_NAMES, label_tokens, prompt_text, vocabulary

ENGINES = (".onnx", ".plan")  # endings of engine files
Text = Callable[[Tensor], Tensor]  # token ids [B, text_len] -> context [B, text_len, text_dim]


class Subject(Protocol):
    """Something that makes clips of the tiny world by plans of denoising steps."""

    name: str
    block_frames: int

    def sample(self, labels: Tensor, frames: int, plan: FixedPlan, seed: int) -> Tensor:
        """A clip for each of `labels` [B, 3]: frames [B, frames, 3, 32, 32] in 0..1.

        Args:
            labels: digit, colour and direction to be asked for.
            frames: of a clip, a multiple of `block_frames`.
            plan: denoising steps of the blocks.
            seed: of all noise.
        """


def block_noise(shape: tuple[int, ...], seed: int, block: int, step: int) -> Tensor:
    """The runtime's noise as a tensor; see `asd_rt.noise.gaussian`."""
    return torch.from_numpy(gaussian(shape, seed, block, step))


def first_noise(batch: int, frames: int, channels: int, size: int, seed: int) -> Tensor:
    """The noise that every block of a video begins with, [batch, frames, channels, 8, 8]."""
    shape = (batch, size, channels, *LATENT_HW)
    return torch.cat([block_noise(shape, seed, b, 0) for b in range(frames // size)], dim=1)


def frozen_network(config: ModelConfig, weights: dict[str, Tensor]) -> WanModel:
    """A network that uses `weights` as they are, to sample from; draws no random numbers."""
    with torch.device("meta"):
        model = WanModel(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def table_text(table: Tensor) -> Text:
    """A text encoder that looks words up in `table` [words + 1, text_dim]."""
    return lambda tokens: table[tokens]


class Student:
    """A causal student in torch, float32."""

    def __init__(
        self,
        name: str,
        model: WanModel,
        cache: CacheConfig,
        schedule: Schedule,
        codec: LinearCodec,
        text: Text,
    ) -> None:
        self.name, self.model, self.cache, self.schedule = name, model, cache, schedule
        self.codec, self.text = codec, text
        self.block_frames = cache.block_frames

    @torch.no_grad()
    def sample(self, labels: Tensor, frames: int, plan: FixedPlan, seed: int) -> Tensor:
        """See `Subject`."""
        config, size = self.model.config, self.block_frames
        noise = first_noise(len(labels), frames, config.in_dim, size, seed)
        prompt = self.model.embed_prompt(self.text(label_tokens(labels, config.text_len)))
        steps = [plan.steps_of(block) for block in range(frames // size)]

        def renoise(block: int, step: int, like: Tensor) -> Tensor:
            return block_noise(tuple(like.shape), seed, block, step + 1)

        done = rollout(self.model, self.cache, self.schedule, noise, prompt, steps, renoise)
        return self.codec.decode(done.latents)


class Teacher:
    """Euler sampling of whole clips from the bidirectional teacher, with classifier-free guidance."""

    def __init__(
        self,
        name: str,
        model: WanModel,
        codec: LinearCodec,
        text: Text,
        steps: int,
        guidance: float,
        shift: float,
        block_frames: int,
    ) -> None:
        self.name, self.model, self.codec, self.text = name, model, codec, text
        self.steps, self.guidance, self.shift = steps, guidance, shift
        self.block_frames = block_frames

    @torch.no_grad()
    def sample(self, labels: Tensor, frames: int, plan: FixedPlan, seed: int) -> Tensor:
        """See `Subject`; `plan` means nothing here."""
        config = self.model.config
        clip = first_noise(len(labels), frames, config.in_dim, self.block_frames, seed)
        named = torch.tensor([NEGATIVE_NAMES]).expand(len(labels), -1)
        tokens = [label_tokens(labels, config.text_len, keep) for keep in (None, named)]
        context = self.text(torch.cat(tokens))
        sigmas = shifted_sigma(torch.linspace(1, 0, self.steps + 1), self.shift)
        for now, after in pairwise(sigmas):
            timesteps = torch.full((2 * len(labels), frames), TRAIN_TIMESTEPS * float(now))
            with mixed_precision():
                flow = self.model(torch.cat([clip, clip]), timesteps, context).float()
            clip = clip + (after - now) * guided_x0(*flow.chunk(2), self.guidance)
        return self.codec.decode(clip)


class EngineSubject:
    """An engine file, through asd_rt alone: its own text part, denoiser and decoder."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Open the engine at `path`.

        Raises:
            EngineError: it is damaged, or makes no videos of the tiny world.
            BackendError: it cannot run here.
        """
        manifest = read_manifest(path)
        told = manifest.tokenizer or {}
        if (
            not {"text", "decoder"} <= set(manifest.parts)
            or told.get("words") != vocabulary()
            or manifest.latent_hw != LATENT_HW
        ):
            raise EngineError(
                f"{path}: makes no videos of the tiny world, which is all that the judge knows; expected a "
                "text part with its vocabulary, a decoder and latents of 8x8"
            )
        self._session = open_session(path, threads, join=False)
        self._decoder = Decoder(self._session.engine, LATENT_HW)
        self.name = str(path)
        self.block_frames = manifest.cache.block_frames

    def sample(self, labels: Tensor, frames: int, plan: FixedPlan, seed: int) -> Tensor:
        """See `Subject`."""
        prompts = [prompt_text(*row) for row in labels.tolist()]
        context = np.concatenate([self._session.context(prompt) for prompt in prompts])
        stream = self._session.generate_from(context, seed, frames, plan=plan)
        latents = np.concatenate([block.latents.copy() for block in stream], axis=1)
        clips = []
        for i in range(len(latents)):
            self._decoder.reset()
            clips.append((self._decoder.decode(latents[i : i + 1]) + 1) / 2)
        return torch.from_numpy(np.concatenate(clips).clip(0, 1))

    def close(self) -> None:
        """Release the engine."""
        self._session.close()


def _tiny(path: Path) -> tuple[Checkpoint, LinearCodec, Tensor]:
    checkpoint = load_checkpoint(path)
    codec, table = checkpoint.codec, checkpoint.table
    if codec is None or table is None or not is_tiny_world(checkpoint):
        raise CheckpointError(
            f"{path}: makes no videos of the tiny world, which is all that the judge knows; expected a "
            "folder with its vocabulary in deployment.json, codec.safetensors and text_encoder.safetensors"
        )
    return checkpoint, codec, table


def open_subject(path: Path, threads: int | None = None) -> Student | EngineSubject:
    """An engine (by its ending), or a student's checkpoint in any format with a codec and a vocabulary.

    Raises:
        AsdError: it cannot be opened, or is of another world.
    """
    if path.suffix in ENGINES:
        return EngineSubject(path, threads)
    checkpoint, codec, table = _tiny(path)
    told = checkpoint.deployment
    cache = CacheConfig(told.block_frames, told.window_frames, told.sink_frames)
    schedule = Schedule(told.timestep_shift)
    model = checkpoint.build_model()
    return Student(str(path), model, cache, schedule, codec, table_text(table))


def open_teacher(path: Path, steps: int, guidance: float) -> Teacher:
    """The teacher in a checkpoint with a codec and a vocabulary, as `python -m train` keeps it.

    Raises:
        AsdError: it cannot be opened, or is of another world.
    """
    checkpoint, codec, table = _tiny(path)
    told = checkpoint.deployment
    return Teacher(
        str(path),
        checkpoint.build_model(),
        codec,
        table_text(table),
        steps,
        guidance,
        told.timestep_shift,
        told.block_frames,
    )


def sample_all(
    subject: Subject,
    labels: Tensor,
    frames: int,
    plan: FixedPlan,
    seed: int,
    title: str,
    keep: int = 0,
) -> Tensor:
    """Sample a clip for every label, in batches with a progress bar; batch i draws noise of `seed` + i.

    Args:
        subject: that makes the clips.
        labels: int64 [N, 3].
        frames: of a clip.
        plan: of the denoising steps.
        seed: of the first batch.
        title: of the progress bar.
        keep: last frames of each clip to keep; 0 = all.
    """
    parts = labels.split(BATCH)
    bar = tqdm(parts, desc=title, unit="batch", leave=False)
    return torch.cat(
        [subject.sample(part, frames, plan, seed + i)[:, -keep:] for i, part in enumerate(bar)]
    )
