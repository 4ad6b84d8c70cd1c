"""Which average of a distillation to keep, by a held-out metric.

Every so many steps the averaged student makes a few clips at several plans, from prompts and noise that
neither training nor the final evaluation draws, and the share of clips with digit, colour and motion
right is noted. Kept is the *latest* average within one standard error of the best so far: a long run that
gets no worse keeps its end, and one that collapses keeps what it was before. Nothing of it touches the
training's randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from asd_rt.config import CacheConfig, ModelConfig
from asd_rt.plan import FixedPlan
from asd_rt.schedule import MAX_STEPS, Schedule
from train.codec import LinearCodec
from train.judge import Judge
from train.samplers import Student, Text, frozen_network, sample_all
from train.tiny_world import random_labels

PLANS = (FixedPlan(1, 1), FixedPlan(1, MAX_STEPS), FixedPlan(2, 2), FixedPlan(4, 4))
PROMPTS_SEED, NOISE_SEED = 90_210, 2**40  # no seeds of an evaluation
Weights = dict[str, Tensor]


class Selection:
    """Keeps the chosen weights of a run; its state belongs into the run's checkpoint."""

    def __init__(self, every: int, clips: int, evaluate: Callable[[Weights], float]) -> None:
        """Choose by `evaluate`, the share of `clips` clips that are right, after every `every` steps."""
        self.every, self._clips, self._evaluate = every, clips, evaluate
        self.best = -1.0
        self.chosen_step = 0
        self.chosen: Weights = {}

    def due(self, done: int, total: int) -> bool:
        """Whether to look after `done` of `total` steps."""
        return done % self.every == 0 or done == total

    def look(self, done: int, weights: Weights) -> dict[str, float]:
        """Judge the averaged `weights` after `done` steps; returns figures for the curve."""
        value = self._evaluate(weights)
        self.best = max(self.best, value)
        error = math.sqrt(self.best * (1 - self.best) / self._clips)
        if not self.chosen or value >= self.best - error:
            self.chosen_step = done
            self.chosen = {name: tensor.clone() for name, tensor in weights.items()}
        return {"held_out": value, "chosen_step": float(self.chosen_step)}

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on."""
        return {"best": self.best, "step": self.chosen_step, "weights": self.chosen}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state saved by `state`."""
        self.best, self.chosen_step = state["best"], state["step"]
        self.chosen = state["weights"]


def held_out_share(
    judge: Judge,
    model: ModelConfig,
    cache: CacheConfig,
    schedule: Schedule,
    codec: LinearCodec,
    text: Text,
    clips: int,
    frames: int,
) -> Callable[[Weights], float]:
    """Weights -> share of clips with all three right, over `clips` prompts and PLANS."""
    labels = random_labels(clips, torch.Generator().manual_seed(PROMPTS_SEED))

    def evaluate(weights: Weights) -> float:
        network = frozen_network(model, weights)
        student = Student("held out", network, cache, schedule, codec, text)
        shares = [
            judge.hits(
                sample_all(student, labels, frames, plan, NOISE_SEED, "held-out clips"), labels
            ).all(axis=1)
            for plan in PLANS
        ]
        return float(sum(share.mean() for share in shares) / len(PLANS))

    return evaluate
