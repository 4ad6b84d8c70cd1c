"""The tiny world's score tables: the same prompts and the same noise for every row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_rt.plan import FixedPlan
from train.judge import Judge
from train.samplers import Subject, sample_all
from train.scores import Scores, measure, real_reference, score
from train.tiny_world import TinyWorld, random_labels

PROMPTS_SEED, REAL_SEED, NOISE_SEED = 4242, 4243, 10_000
SEED_STRIDE = 100_003  # between evaluations with other seeds
LATER = 4  # a later clip is the last of so many
COLUMNS = (
    *("total", "quality", "semantic", "digit", "colour", "motion", "all_right"),
    *("frechet", "consistency", "sharpness"),
)
WITH_INTERVAL = ("total", "quality", "semantic", "all_right")
HEADINGS = {"all_right": "all three", "frechet": "Frechet distance"}


@dataclass(frozen=True)
class Row:
    """One line of a score table.

    Attributes:
        name: of what made the clips.
        plan: of the denoising steps; None = it has no plan (real clips, the teacher).
        first_frame, last_frame: that were judged, counted from 1.
        clips: that were judged.
        scores: what was found.
    """

    name: str
    plan: FixedPlan | None
    first_frame: int
    last_frame: int
    clips: int
    scores: Scores

    @property
    def title(self) -> str:
        """Name, plan and, if they are not the first, frames."""
        parts = [self.name]
        if self.plan is not None:
            parts.append(plan_name(self.plan))
        if self.first_frame > 1:
            parts.append(f"frames {self.first_frame}-{self.last_frame}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        plan = self.plan
        return {
            "name": self.name,
            "steps": None if plan is None else plan.steps,
            "first_steps": None if plan is None else plan.first_steps,
            "frames": [self.first_frame, self.last_frame],
            "clips": self.clips,
            "figures": self.scores.to_json(),
        }


def plan_name(plan: FixedPlan) -> str:
    """A plan in words: "1 step", "2 steps", or with First-Frame Enhancement "1* step"."""
    star = "*" if plan.first_steps > plan.steps else ""
    return f"{plan.steps}{star} step{'s' if plan.steps > 1 else ''}"


def make_plans(steps: Iterable[int], first_steps: Iterable[int | None]) -> list[FixedPlan]:
    """Plans of each number of `steps` with each of `first_steps` for the first block.

    None stands for no First-Frame Enhancement. What would give the first block fewer steps than the others,
    or repeat a plan, is left out.
    """
    plans: list[FixedPlan] = []
    firsts = list(first_steps)
    for count in steps:
        for first in firsts:
            plan = FixedPlan(count, count if first is None else first)
            if plan.first_steps >= count and plan not in plans:
                plans.append(plan)
    return plans


class Evaluation:
    """Prompts, noise and real clips of one evaluation, whose subjects are judged alike."""

    def __init__(self, judge: Judge, clips: int, frames: int, seed: int = 0) -> None:
        """Draw the prompts and measure real clips.

        Args:
            judge: of all rows.
            clips: a row.
            frames: of a clip.
            seed: of prompts, held-out clips and noise.
        """
        self.judge, self.clips, self.frames = judge, clips, frames
        shift = SEED_STRIDE * seed
        self._real_seed, self._noise_seed = REAL_SEED + shift, NOISE_SEED + shift
        generator = torch.Generator().manual_seed(PROMPTS_SEED + shift)
        self.labels = random_labels(clips, generator)
        self.reference = real_reference(judge, self.labels, frames)

    def real(self, later: bool = False) -> Row:
        """The upper bound: clips of held-out glyphs, after the codec."""
        begin = (LATER - 1) * self.frames if later else 0
        starts = torch.full((self.clips,), begin)
        generator = torch.Generator().manual_seed(self._real_seed)
        world, codec = TinyWorld("test"), self.judge.codec
        clips = world.draw(self.clips, self.frames, generator, self.labels, starts).frames
        return self._row("real, held-out glyphs", None, codec.decode(codec.encode(clips)), later)

    def subject(
        self, subject: Subject, plan: FixedPlan | None, later: bool = False
    ) -> tuple[Row, Tensor]:
        """Judge a subject.

        Args:
            subject: to be judged.
            plan: of its denoising steps; None = it has none.
            later: judge the last of LATER clips' length of frames, not the first.

        Returns:
            its row, and the judged frames [clips, frames, 3, 32, 32].
        """
        length = LATER * self.frames if later else self.frames
        title = subject.name if plan is None else f"{subject.name}, {plan_name(plan)}"
        frames = sample_all(
            subject,
            self.labels,
            length,
            plan or FixedPlan(1, 1),
            self._noise_seed,
            title,
            keep=self.frames,
        )
        return self._row(subject.name, plan, frames, later), frames

    def _row(self, name: str, plan: FixedPlan | None, frames: Tensor, later: bool) -> Row:
        scores = score(measure(self.judge, frames, self.labels, later), self.reference)
        begin = (LATER - 1) * self.frames if later else 0
        return Row(name, plan, begin + 1, begin + self.frames, self.clips, scores)


def markdown(rows: Sequence[Row]) -> str:
    """The score table."""
    heads = [HEADINGS.get(name, name) for name in COLUMNS]
    lines = [f"| clips | {' | '.join(heads)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = []
        for name in COLUMNS:
            found = row.scores.of(name)
            cells.append(found.points() if name in WITH_INTERVAL else f"{found.value:.1f}")
        lines.append(f"| {row.title} ({row.clips}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


EXPLANATION = """Digit, colour and motion: percent of clips in which a classifier trained on real clips
finds what was asked for; semantic is their mean. Quality is the mean of appearance (Frechet distance of
the classifier's features to real clips', by their spread), consistency from frame to frame and sharpness,
each 100 where clips are like real ones; total is (4 quality + semantic) / 5. `*` is First-Frame
Enhancement. 95 % bootstrap intervals over prompts."""
