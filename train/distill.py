"""Stage "distill": DMD and adversarial self-distillation on the student's own rollouts.

Every step draws a number of denoising steps n. DMD pulls the n-step rollout towards the teacher's
distribution; for n < 4 ASD also pulls it towards the student's own (n+1)-step rollouts, a nearer target. One
set of weights thus serves 1, 2, 3 and 4 steps. Part of the rollouts give the first block all 4 steps, as
First-Frame Enhancement does at inference. Source: ASD (arXiv 2511.01419), Self Forcing, DMD2.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_rt.schedule import MAX_STEPS, Schedule
from train.causal_init import jump_after_sinks
from train.codec import VocabularyEncoder
from train.config import TrainConfig
from train.discriminator import Discriminator
from train.losses import (
    asd_discriminator_loss,
    asd_generator_loss,
    dmd_gradient,
    dmd_loss,
    finite_difference_penalty,
    flow_matching_loss,
    flow_to_x0,
    guided_x0,
    noise_levels,
    noisy_latents,
    shifted_sigma,
)
from train.model import KeyValue, WanModel, make_rope
from train.precision import mixed_precision
from train.rollout import Rollout, last_passes, rollout
from train.stage import Ema, Stage, step_generator
from train.tiny_world import NEGATIVE_NAMES, label_tokens, random_labels

REPLAY = 8  # clips batches that the critic may see again


@dataclass(frozen=True, slots=True)
class _Task:
    """One training step: what is rolled out, and which clip of it is judged under which prompt."""

    n: int
    context: Tensor
    score_context: Tensor
    negative_context: Tensor
    enhanced: bool
    use_asd: bool
    positions: list[int]
    first: int
    blocks: int

    def plan(self, steps: int) -> list[int]:
        """Denoising steps of each block."""
        return [MAX_STEPS if self.enhanced else steps] + [steps] * (self.blocks - 1)


@dataclass(frozen=True, slots=True)
class _Pair:
    """An n-step clip ("fake") beside an (n+1)-step one ("real"), noised alike, as the teacher sees them."""

    fake_t: Tensor
    real_t: Tensor
    fake: list[Tensor]
    real: list[Tensor]
    sigma: Tensor
    steps: Tensor


class DistillStage(Stage):
    """Student, critic and discriminator; the teacher is frozen."""

    name = "distill"

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        text: VocabularyEncoder,
        teacher: dict[str, Tensor],
        student: dict[str, Tensor],
        latent_hw: tuple[int, int],
    ) -> None:
        settings = config.distill
        self.config, self.seed, self.text, self.latent_hw = config, seed, text, latent_hw
        self.steps = settings.steps
        self.schedule = Schedule(config.timestep_shift)
        torch.manual_seed(seed)
        self.teacher, self.critic, self.student = (WanModel(config.model) for _ in range(3))
        self.teacher.load_state_dict(teacher)
        self.critic.load_state_dict(teacher)
        self.student.load_state_dict(student)
        self.teacher.requires_grad_(False)
        layers = config.model.num_layers
        self.feature_layers = sorted({layers // 2 - 1, layers - 1} & set(range(layers)))
        self.discriminator = Discriminator(config.model.dim, len(self.feature_layers))
        self.networks = {
            "student": self.student,
            "critic": self.critic,
            "discriminator": self.discriminator,
        }
        rates = (settings.student_lr, settings.critic_lr, settings.discriminator_lr)
        self.optimizers = {
            name: torch.optim.AdamW(
                network.parameters(), lr=lr, betas=settings.betas, weight_decay=0.01, fused=True
            )
            for (name, network), lr in zip(self.networks.items(), rates, strict=True)
        }
        self.ema = Ema(self.student, settings.ema)
        self.replay: deque[tuple[Tensor, Tensor]] = deque(maxlen=REPLAY)

    # --- pieces of a step

    def _score(
        self, model: WanModel, x_t: Tensor, sigma: Tensor, context: Tensor, features: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Flow and (on request) features of a bidirectional pass at noise levels [B, F]."""
        frames, (height, width) = x_t.shape[1], self.latent_hw
        rope = make_rope(model.config, range(frames), (height // 2, width // 2))
        collected: list[Tensor] = []
        flow, _ = model.denoise(
            x_t,
            model.embed_time(1000 * sigma),
            model.embed_prompt(context),
            rope,
            features=collected if features else None,
        )
        return flow.float(), [collected[i] for i in self.feature_layers] if features else []

    def _rollout(
        self,
        prompt: list[KeyValue],
        steps_per_block: list[int],
        positions: list[int],
        generator: torch.Generator,
    ) -> Rollout:
        shape = (
            self.config.distill.batch,
            len(positions),
            self.config.model.in_dim,
            *self.latent_hw,
        )
        noise = torch.randn(shape, generator=generator)
        return rollout(
            self.student,
            self.config.cache,
            self.schedule,
            noise,
            prompt,
            steps_per_block,
            lambda block, step, like: torch.randn(like.shape, generator=generator),
            positions=positions,
        )

    def _update(self, name: str, loss: Tensor) -> float:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.networks[name].parameters(), self.config.distill.grad_clip
        )
        optimizer.step()
        return norm.item()

    def _sigma(self, generator: torch.Generator) -> Tensor:
        """Noise levels [B, F] at which the scores are compared: 0.02..0.98, or 0 for clean frames."""
        settings = self.config.distill
        u = noise_levels(
            settings.batch,
            self.config.clip_frames,
            self.config.cache.block_frames,
            settings.mixed_noise,
            generator,
            settings.anchored_noise,
        )
        sigma = shifted_sigma(u, self.config.timestep_shift)
        return torch.where(sigma > 0, sigma.clamp(0.02, 0.98), sigma)

    # --- one step

    def step(self, index: int) -> dict[str, float]:
        settings = self.config.distill
        generator = step_generator(self.seed, self.name, index)
        task = self._draw_task(index, generator)
        first, window = task.first, self.config.clip_frames

        with mixed_precision(), torch.no_grad():
            prompt = self.student.embed_prompt(task.context)
            done = self._rollout(prompt, task.plan(task.n), task.positions, generator)
            target = None
            if task.use_asd:
                target = self._rollout(prompt, task.plan(task.n + 1), task.positions, generator)
        sigma = self._sigma(generator)
        noise = torch.randn(settings.batch, window, *done.latents.shape[2:], generator=generator)
        with mixed_precision():
            prompt = self.student.embed_prompt(task.context)
            x = last_passes(self.student, self.config.cache, done, prompt, first, window)
            clip = x.detach().requires_grad_()
            x_t = noisy_latents(clip, noise, sigma)
            gradient = self._dmd_gradient(clip.detach(), x_t.detach(), sigma, task)
            (pull,) = torch.autograd.grad(dmd_loss(clip, gradient), clip)
            pair = None
            if target is not None:
                real_t = noisy_latents(target.latents[:, first : first + window], noise, sigma)
                pair = self._read_pair(x_t, real_t, sigma, task)
                adversarial = self._asd_loss(pair)
                (push,) = torch.autograd.grad(adversarial, clip)
                # Weighted by gradient norms: ASD's raw gradient grows manyfold in a run, DMD's does not.
                pull = pull + settings.asd_ratio * pull.norm() / push.norm().clamp_min(1e-12) * push
        figures = {"loss": gradient.abs().mean().item(), "n": float(task.n)}
        figures["grad_norm"] = self._update("student", (x * pull).sum())
        self.ema.update(self.student, settings.ema if index >= settings.ema_start else 0.0)
        if pair is not None:
            figures["disc"] = self._discriminator_step(pair, task, generator)
        self.replay.append((x.detach().to(torch.bfloat16), task.score_context))
        losses = []
        for update in range(settings.critic_updates):
            pick = len(self.replay) - 1
            if update:
                pick = int(torch.randint(len(self.replay), (1,), generator=generator))
            losses.append(self._critic_step(*self.replay[pick], generator))
        figures["critic"] = sum(losses) / max(1, len(losses))
        return figures

    def _draw_task(self, index: int, generator: torch.Generator) -> _Task:
        """What step `index` trains: n, prompts, rollout length, and the clip of it that is judged."""
        settings, cache = self.config.distill, self.config.cache

        def chance() -> float:
            return torch.rand(1, generator=generator).item()

        weights = torch.tensor(settings.step_weights)
        n = 1 + int(torch.multinomial(weights, 1, generator=generator))
        labels = random_labels(settings.batch, generator)
        enhanced = n < MAX_STEPS and chance() < settings.first_steps_share
        # Most rollouts are one clip long; the others run on, so that window and sinks are trained too.
        window = self.config.clip_frames
        long = settings.frames > window and chance() < settings.long_share
        frames = settings.frames if long else window
        positions, first = list(range(frames)), 0
        if long:
            positions = jump_after_sinks(cache, frames, generator)
            earliest = cache.block_frames if positions[-1] >= frames else 0
            choices = range(earliest, frames - window + 1, cache.block_frames)
            first = choices[int(torch.randint(len(choices), (1,), generator=generator))]
        text_len = self.config.model.text_len
        # Later in its life a digit may have turned round: its clip is judged without the direction.
        named = torch.tensor([[True, True, first == 0]]).expand(len(labels), -1)
        negative = named & torch.tensor(NEGATIVE_NAMES)
        return _Task(
            n=n,
            context=self.text(label_tokens(labels, text_len)),
            score_context=self.text(label_tokens(labels, text_len, named)),
            negative_context=self.text(label_tokens(labels, text_len, negative)),
            enhanced=enhanced,
            use_asd=n < MAX_STEPS and settings.asd_ratio > 0 and index >= settings.asd_warmup,
            positions=positions,
            first=first,
            blocks=frames // cache.block_frames,
        )

    @torch.no_grad()
    def _dmd_gradient(self, x: Tensor, x_t: Tensor, sigma: Tensor, task: _Task) -> Tensor:
        both, _ = self._score(
            self.teacher,
            torch.cat([x_t, x_t]),
            torch.cat([sigma, sigma]),
            torch.cat([task.score_context, task.negative_context]),
        )
        fake, _ = self._score(self.critic, x_t, sigma, task.score_context)
        cond, uncond = both.chunk(2)
        flow = guided_x0(cond, uncond, self.config.distill.guidance)
        return dmd_gradient(x, flow_to_x0(fake, x_t, sigma), flow_to_x0(flow, x_t, sigma))

    def _read_pair(self, fake_t: Tensor, real_t: Tensor, sigma: Tensor, task: _Task) -> _Pair:
        """The teacher's features of an n-step clip (with gradient) and an (n+1)-step clip, both noised."""
        _, fake = self._score(self.teacher, fake_t, sigma, task.score_context, features=True)
        with torch.no_grad():
            _, real = self._score(self.teacher, real_t, sigma, task.score_context, features=True)
        steps = torch.full((len(sigma),), task.n)
        return _Pair(fake_t.detach(), real_t, fake, real, sigma, steps)

    def _asd_loss(self, pair: _Pair) -> Tensor:
        with torch.no_grad():
            real = self.discriminator(pair.real, pair.steps, pair.sigma)
        return asd_generator_loss(self.discriminator(pair.fake, pair.steps, pair.sigma), real)

    def _discriminator_step(self, pair: _Pair, task: _Task, generator: torch.Generator) -> float:
        """Relativistic loss, with approximate R1 and R2: how far do logits move when clips are shaken?"""
        settings = self.config.distill
        clips = torch.cat([pair.fake_t, pair.real_t])
        shaken = clips + settings.regularise_sigma * torch.randn(clips.shape, generator=generator)
        sigma = pair.sigma.repeat(2, 1)
        with torch.no_grad(), mixed_precision():
            _, moved = self._score(
                self.teacher, shaken, sigma, task.score_context.repeat(2, 1, 1), features=True
            )
        features = [
            torch.cat([fake.detach(), real, both])
            for fake, real, both in zip(pair.fake, pair.real, moved, strict=True)
        ]
        logits = self.discriminator(features, pair.steps.repeat(4), sigma.repeat(2, 1))
        fake, real, fake_shaken, real_shaken = logits.chunk(4)
        loss = asd_discriminator_loss(fake, real)
        penalty = settings.r1_weight * finite_difference_penalty(real, real_shaken)
        penalty = penalty + settings.r2_weight * finite_difference_penalty(fake, fake_shaken)
        self._update("discriminator", loss + penalty / settings.regularise_sigma**2)
        return loss.item()

    def _critic_step(self, x: Tensor, context: Tensor, generator: torch.Generator) -> float:
        x = x.float()
        sigma = self._sigma(generator)
        noise = torch.randn(x.shape, generator=generator)
        with mixed_precision():
            flow, _ = self._score(self.critic, noisy_latents(x, noise, sigma), sigma, context)
        loss = flow_matching_loss(flow, x, noise)
        self._update("critic", loss)
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {
            "networks": {k: m.state_dict() for k, m in self.networks.items()},
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
            "ema": self.ema.values,
            "replay": list(self.replay),
        }

    def load(self, state: dict[str, Any]) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        self.ema.values = state["ema"]
        self.replay.extend(tuple(item) for item in state["replay"])
