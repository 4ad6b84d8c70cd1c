"""Real prompts, clips and ODE pairs as a source, every one once an epoch in an order drawn by chance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from asd_rt.commands.encode import read_prompts
from asd_rt.errors import ConfigError
from asd_rt.schedule import MAX_STEPS, Schedule
from train.clip_shards import ClipShards, batch_indices
from train.config import TrainConfig
from train.data import Batch, Contexts, Data
from train.pair_shards import PairShards
from train.prompt_table import PromptTable


def open_table(config: TrainConfig) -> PromptTable:
    """The embeddings of all prompts."""
    return PromptTable(Path(config.data.embeddings), config.model, "data.embeddings")


def listed_prompts(config: TrainConfig) -> list[str]:
    """The prompts to distil with, each once."""
    return list(dict.fromkeys(read_prompts(Path(config.data.prompts), "data.prompts")))


def open_negative(config: TrainConfig) -> Tensor:
    """The negative prompt's embedding, [1, text_len, text_dim]."""
    return PromptTable(Path(config.data.negative), config.model, "data.negative").contexts([0])


def open_clips(config: TrainConfig) -> ClipShards:
    """The clips.

    Raises:
        ConfigError: they cannot be read, or are too short or of another size.
    """
    clips = ClipShards(Path(config.data.clips))
    frames, *frame = clips.read([0])[0].shape[1:]
    needed = max(
        config.clip_frames if config.teacher else 0,
        config.init.frames if config.init and not config.data.ode_pairs else 0,
    )
    wanted = [config.model.in_dim, *config.data.latent_hw]
    if frame != wanted or frames < needed:
        raise ConfigError(
            f"data.clips {config.data.clips}: holds clips [F, C, h, w] {[frames, *frame]}, expected "
            f"{[needed, *wanted]} or longer; make them with python -m train.clips, or set data.latent_hw"
        )
    return clips


def open_pairs(config: TrainConfig) -> PairShards:
    """The ODE pairs.

    Raises:
        ConfigError: they cannot be read, or are of another size, length or schedule.
    """
    pairs = PairShards(Path(config.data.ode_pairs))
    where = f"data.ode_pairs {config.data.ode_pairs}"
    wanted = [config.init.frames, config.model.in_dim, *config.data.latent_hw]
    if pairs.settings.shape != wanted:
        raise ConfigError(
            f"{where}: holds clips [F, C, h, w] {pairs.settings.shape}, expected {wanted}; make them with "
            "these --frames and --latent-size, or set init.frames"
        )
    sigmas = [step.sigma for step in Schedule(config.timestep_shift).steps(MAX_STEPS)]
    if any(abs(a - b) > 1e-5 for a, b in zip(sigmas, pairs.settings.sigmas, strict=True)):
        raise ConfigError(
            f"{where}: made with --timestep-shift {pairs.settings.shift:g}, timestep_shift is "
            f"{config.timestep_shift:g}; make them again with that"
        )
    return pairs


class ClipData(Data):
    """What [data] of a configuration names."""

    def __init__(self, config: TrainConfig, seed: int) -> None:
        """Open everything.

        Raises:
            ConfigError: something is absent, damaged or of another size.
        """
        data, self.config, self.seed = config.data, config, seed
        self.latent_hw = (data.latent_hw[0], data.latent_hw[1])
        self.table, self.negative = open_table(config), open_negative(config)
        self.prompts = self.table.rows(listed_prompts(config), f"lines of {data.prompts}")
        self.clips = open_clips(config) if data.clips else None
        self.pairs = open_pairs(config) if data.ode_pairs and config.init else None
        self.captions = self.pair_rows = []
        if self.clips:
            captions = [clip.caption for clip in self.clips.index.clips]
            self.captions = self.table.rows(captions, f"captions of {data.clips}")
        if self.pairs:
            self.pair_rows = self.table.rows(
                self.pairs.settings.prompts, f"prompts of {data.ode_pairs}"
            )

    def _pick(self, count: int, batch: int, index: int, share: int) -> list[int]:
        shares = self.config.parallel.micro_batches if self.config.parallel else 1
        return batch_indices(count, batch, index, self.seed, share, shares)

    def _batch(self, batch: int, frames: int, index: int, share: int) -> Batch:
        picked = self._pick(len(self.clips), batch, index, share)
        latents, _ = self.clips.read(picked)
        context = self.table.contexts([self.captions[i] for i in picked])
        return Batch(latents[:, :frames], context, list(range(frames)))

    def teacher_batch(self, index: int, share: int, generator: torch.Generator) -> Batch:
        settings = self.config.teacher
        batch = self._batch(settings.batch, self.config.clip_frames, index, share)
        dropped = torch.rand(settings.batch, generator=generator) < settings.drop_prompt
        context = torch.where(dropped[:, None, None], self.negative, batch.context)
        return batch._replace(context=context)

    def init_batch(self, index: int, share: int, generator: torch.Generator) -> Batch:
        return self._batch(self.config.init.batch, self.config.init.frames, index, share)

    def ode_batch(self, index: int, share: int) -> tuple[Tensor, Tensor, Tensor]:
        picked = self._pick(len(self.pairs), self.config.init.batch, index, share)
        path, x0 = self.pairs.read(picked)
        return path, x0, self.table.contexts([self.pair_rows[i] for i in picked])

    def draw_prompts(self, index: int, share: int, generator: torch.Generator) -> Tensor:
        picked = self._pick(len(self.prompts), self.config.distill.batch, index, share)
        return torch.tensor([self.prompts[i] for i in picked])

    def contexts(self, drawn: Tensor, later: bool) -> Contexts:
        context = self.table.contexts(drawn.tolist())
        return Contexts(context, context, self.negative.expand_as(context))
