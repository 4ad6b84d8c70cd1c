"""Stage "distill": DMD and adversarial self-distillation on the student's own rollouts.

Every step draws a number of denoising steps n. DMD pulls the n-step rollout towards the teacher's
distribution; for n < 4 ASD also pulls it towards the student's own (n+1)-step rollouts, a nearer target. One
set of weights thus serves 1, 2, 3 and 4 steps. Part of the rollouts give the first block all 4 steps, as
First-Frame Enhancement does at inference. Source: ASD (arXiv 2511.01419), Self Forcing, DMD2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asd_rt.schedule import MAX_STEPS, Schedule
from train.config import TrainConfig
from train.data import Data
from train.distill_task import Share, Task, draw_step
from train.losses import (
    asd_discriminator_loss,
    asd_generator_loss,
    dmd_loss,
    flow_matching_loss,
    noisy_latents,
)
from train.optimizers import Ema, adamw, load_optimizer_state, optimizer_state
from train.parallel import SINGLE, Parallel, local
from train.replay import Replay
from train.rollout import Rollout, last_passes, rollout
from train.scoring import (
    Networks,
    Pair,
    pair_logits,
    predict,
    read_pair,
    read_shaken,
    score_levels,
    shake_penalty,
    teacher_gradient,
)
from train.selection import Selection
from train.stage import Stage

SEPARATION_RATE = 0.1  # of its running average
Figures = dict[str, list[Tensor]]


class DistillStage(Stage):
    """Student, critic and discriminator; the teacher is frozen."""

    name = "distill"

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        data: Data,
        networks: Networks,
        parallel: Parallel = SINGLE,
        selection: Selection | None = None,
    ) -> None:
        settings = config.distill
        self.selection = selection
        self.config, self.seed, self.data, self.parallel = config, seed, data, parallel
        self.networks = networks
        self.steps = settings.steps
        self.schedule = Schedule(config.timestep_shift)
        networks.teacher.requires_grad_(False)
        self.trained = {
            "student": networks.student,
            "critic": networks.critic,
            "discriminator": networks.discriminator,
        }
        rates = (settings.student_lr, settings.critic_lr, settings.discriminator_lr)
        self.optimizers = {
            name: adamw(list(network.parameters()), lr, settings.betas)
            for (name, network), lr in zip(self.trained.items(), rates, strict=True)
        }
        self.ema = Ema(networks.student, settings.ema)
        model, (height, width) = config.model, data.latent_hw
        self.clip = (settings.batch, config.clip_frames, model.in_dim, height, width)
        context = (settings.batch, model.text_len, model.text_dim)
        self.replays = {number: Replay(self.clip, context) for number in parallel.shares}
        # By plan, how far the discriminator tells n-step clips from (n+1)-step ones: 0 by chance, 1 always.
        self.separation = {name: 0.0 for n in range(1, MAX_STEPS) for name in (f"{n}", f"{n}*")}

    def step(self, index: int) -> dict[str, float]:
        figures = self.parallel.average(self.advance(index))
        if "apart" in figures:
            plan = _plan_name(figures["n"], figures["enhanced"])
            self.separation[plan] += SEPARATION_RATE * (figures["apart"] - self.separation[plan])
        if self.selection is not None and self.selection.due(index + 1, self.steps):
            figures |= self.selection.look(index + 1, self.ema.values)
        return figures

    def result(self) -> dict[str, Tensor]:
        """The averaged student: the chosen one, or without a selection the last one."""
        return self.ema.values if self.selection is None else self.selection.chosen

    def advance(self, index: int) -> dict[str, Tensor]:
        """Training step `index`; returns figures, means over this process's micro-batches."""
        settings, parallel = self.config.distill, self.parallel
        task, shares = draw_step(
            self.config, self.data, self.seed, self.name, index, parallel.shares
        )
        figures: Figures = {"loss": [], "disc": [], "apart": [], "critic": []}
        # By norms alone, what a discriminator that tells nothing apart says would count as much as DMD.
        separation = self.separation.get(_plan_name(task.n, task.enhanced), 0.0)
        ratio = settings.asd_ratio * max(0.0, separation)
        pulls = _Pulls(self.networks.student, ratio, parallel)
        for share in shares:
            self._pull(task, share, pulls, figures)
        pulls.apply()
        norm = self._update("student")
        self.ema.update(self.networks.student, settings.ema if index >= settings.ema_start else 0.0)
        # All norms are figures: what is not finite shows before its step is saved.
        norms = {"grad_norm": norm}
        if task.use_asd:
            norms["disc_norm"] = self._update("discriminator")
        critic_norms = []
        for update in range(settings.critic_updates):
            for share in shares:
                figures["critic"].append(self._critic_loss(share, newest=update == 0))
            critic_norms.append(self._update("critic"))
        norms["critic_norm"] = torch.stack(critic_norms).max()
        means = {k: torch.stack(v).double().mean() for k, v in figures.items() if v}
        drawn = {"n": task.n, "enhanced": task.enhanced}
        if task.use_asd:
            drawn["push"] = ratio
        return {
            "loss": means.pop("loss"),
            **{k: torch.tensor(float(v), device=parallel.device) for k, v in drawn.items()},
            **norms,
            **means,
        }

    # --- pieces of a step

    def _update(self, name: str) -> Tensor:
        """Apply and clear the gradients of a network; returns their norm."""
        network, optimizer = self.trained[name], self.optimizers[name]
        norm = self.parallel.clip(network, self.config.distill.grad_clip)
        self.parallel.reshard(network)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _rollout(self, task: Task, share: Share, steps: int, prompt: Any) -> Rollout:
        device = self.parallel.device
        batch, _, *frame = self.clip
        return rollout(
            self.networks.student,
            self.config.cache,
            self.schedule,
            share.noise((batch, len(task.positions), *frame), device),
            prompt,
            task.plan(steps),
            lambda block, step, like: share.noise(like.shape, device),
            positions=task.positions,
        )

    def _pull(self, task: Task, share: Share, pulls: _Pulls, figures: Figures) -> None:
        """Roll out, and find where DMD and ASD pull the clip; the discriminator gets its gradient too."""
        settings, device, networks = self.config.distill, self.parallel.device, self.networks
        student, window = networks.student, self.config.clip_frames
        contexts = share.contexts.to(device)
        target = None
        with self.parallel.autocast(), torch.no_grad(), self.parallel.kept_whole(student):
            prompt = student.embed_prompt(contexts.rollout)
            done = self._rollout(task, share, task.n, prompt)
            if task.use_asd:
                target = self._rollout(task, share, task.n + 1, prompt).latents
        sigma = score_levels(self.config, share.generator).to(device)
        noise = share.noise(self.clip, device)
        with self.parallel.autocast():
            prompt = student.embed_prompt(contexts.rollout)
            x = last_passes(student, self.config.cache, done, prompt, task.first, window)
            clip = x.detach().requires_grad_()
            x_t = noisy_latents(clip, noise, sigma)
            # DMD takes the flow of this pass, ASD its features, with gradient where it counts.
            with torch.set_grad_enabled(target is not None and pulls.ratio > 0):
                cond, fake = predict(networks.teacher, x_t, sigma, contexts.score, features=True)
            seen = (clip.detach(), x_t.detach(), sigma, contexts, cond.detach())
            gradient = teacher_gradient(networks, *seen, settings.guidance)
            (pull,) = torch.autograd.grad(dmd_loss(clip, gradient), clip)
            push = pair = None
            if target is not None:
                real_t = noisy_latents(target[:, task.first : task.first + window], noise, sigma)
                pair = read_pair(networks, x_t, fake, real_t, sigma, contexts.score, task.n)
                loss, apart = self._asd_loss(pair)
                figures["apart"].append(apart)
                if pulls.ratio:
                    (push,) = torch.autograd.grad(loss, clip)
        figures["loss"].append(gradient.abs().mean())
        pulls.add(x, pull, push)
        if pair is not None:
            figures["disc"].append(self._discriminator_loss(pair, contexts.score, share))
        self._remember(share, x.detach())

    def _remember(self, share: Share, x: Tensor) -> None:
        self.replays[share.number].append(x.cpu(), share.contexts.score)

    def _asd_loss(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The generator's loss, and how far the discriminator tells its pairs apart: -1..1, 0 by chance."""
        discriminator = self.networks.discriminator
        with torch.no_grad():
            real = discriminator(pair.real, pair.steps, pair.sigma)
        fake = discriminator(pair.fake, pair.steps, pair.sigma)
        apart = (real - fake.detach()).sign().double().mean()
        return asd_generator_loss(fake, real), apart

    def _discriminator_loss(self, pair: Pair, context: Tensor, share: Share) -> Tensor:
        """Add the discriminator's gradient: of its relativistic loss, and of R1 and R2."""
        settings = self.config.distill
        batch, *rest = pair.fake_t.shape
        noise = share.noise((2 * batch, *rest), self.parallel.device)
        with self.parallel.autocast():
            moved = read_shaken(self.networks, pair, settings.regularise_sigma * noise, context)
        logits = pair_logits(self.networks.discriminator, pair, moved)
        loss = asd_discriminator_loss(*logits[:2])
        penalty = shake_penalty(logits, settings.r1_weight, settings.r2_weight)
        total = loss + penalty / settings.regularise_sigma**2
        (total / len(self.parallel.shares)).backward()
        return loss.detach()

    def _critic_loss(self, share: Share, newest: bool) -> Tensor:
        """Add the critic's gradient on the student's newest clips, or on some of its last."""
        replay, device = self.replays[share.number], self.parallel.device
        pick = len(replay) - 1
        if not newest:
            pick = int(torch.randint(len(replay), (1,), generator=share.generator))
        x, context = replay.batch(pick, device)
        sigma = score_levels(self.config, share.generator).to(device)
        noise = share.noise(self.clip, device)
        with self.parallel.autocast():
            flow, _ = predict(self.networks.critic, noisy_latents(x, noise, sigma), sigma, context)
        loss = flow_matching_loss(flow, x, noise)
        (loss / len(self.parallel.shares)).backward()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        chosen = {} if self.selection is None else {"selection": self.selection.state()}
        return {
            **chosen,
            "separation": torch.tensor(list(self.separation.values()), dtype=torch.float64),
            "networks": {k: m.state_dict() for k, m in self.trained.items()},
            "optimizers": {
                k: optimizer_state(o, self.trained[k]) for k, o in self.optimizers.items()
            },
            "ema": self.ema.values,
            "replay": {str(number): replay.state() for number, replay in self.replays.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        for name, network in self.trained.items():
            network.load_state_dict(state["networks"][name])
            load_optimizer_state(self.optimizers[name], network, state["optimizers"][name])
        self.ema.values = state["ema"]
        self.separation = dict(zip(self.separation, state["separation"].tolist(), strict=True))
        for number, replay in self.replays.items():
            replay.load(state["replay"][str(number)])
        if self.selection is not None:
            self.selection.load(state["selection"])


def _plan_name(steps: float, enhanced: float) -> str:
    """As in tables: 1 is one step a block, 1* the same behind a first block of 4."""
    return f"{steps:.0f}{'*' if enhanced else ''}"


class _Pulls:
    """The student's gradient: pulls (DMD), and pushes (ASD) weighted against them by norms over a whole step.

    ASD's raw gradient grows manyfold in a run, DMD's does not, hence the norms. They are known when all
    micro-batches are done. The graph of a single micro-batch can wait for that; of several, pulls and pushes
    go through the network at once, into sums of their own, and no graph is kept.
    """

    def __init__(self, student: torch.nn.Module, ratio: float, parallel: Parallel) -> None:
        self._parameters = list(student.parameters())
        self.ratio, self._parallel = ratio, parallel
        self._count = len(parallel.shares)
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._pushed: list[Tensor | None] = [None] * len(self._parameters)
        self._norms: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, pull: Tensor, push: Tensor | None) -> None:
        """Clips x with their graph, and the two gradients at them."""
        if push is not None:
            self._norms.append((pull.norm(), push.norm()))
        if self._count == 1:
            self._waiting.append((x, pull, push))
            return
        (x * pull / self._count).sum().backward(retain_graph=push is not None)
        if push is not None:
            pulled = [p.grad for p in self._parameters]
            for parameter, grad in zip(self._parameters, self._pushed, strict=True):
                parameter.grad = grad
            (x * push / self._count).sum().backward()
            self._pushed = [p.grad for p in self._parameters]
            for parameter, grad in zip(self._parameters, pulled, strict=True):
                parameter.grad = grad

    def apply(self) -> None:
        """Leave the whole gradient in the parameters."""
        weight = None
        if self._norms:
            pulls, pushes = (self._parallel.norm(norms) for norms in zip(*self._norms, strict=True))
            weight = self.ratio * pulls / pushes.clamp_min(1e-12)
        for x, pull, push in self._waiting:
            if push is not None:
                pull = pull + weight * push
            (x * pull).sum().backward()
        if weight is not None:
            for parameter, pushed in zip(self._parameters, self._pushed, strict=True):
                if pushed is not None:
                    local(parameter.grad).add_(weight * local(pushed))
