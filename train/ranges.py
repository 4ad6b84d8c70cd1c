"""What the numbers of a training configuration may be, by their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from asd_rt.errors import ConfigError
from asd_rt.schedule import MAX_STEPS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Rule = tuple[str, Callable[[Any], bool]]

COUNT: Rule = ("a whole number >= 1", lambda v: v >= 1)
RATE: Rule = ("a number > 0", lambda v: 0 < v < inf)
WEIGHT: Rule = ("a number >= 0", lambda v: 0 <= v < inf)
SHARE: Rule = ("a share from 0 to 1", lambda v: 0 <= v <= 1)
DECAY: Rule = ("a number >= 0 and < 1", lambda v: 0 <= v < 1)
DECAYS: Rule = ("two numbers >= 0 and < 1", lambda v: len(v) == 2 and all(0 <= x < 1 for x in v))
CHANCES: Rule = (
    f"{MAX_STEPS} numbers >= 0, not all 0",
    lambda v: len(v) == MAX_STEPS and all(map(isfinite, v)) and min(v) >= 0 and sum(v) > 0,
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("steps", "batch", "frames", "clip_frames", "eval_clips", "critic_updates", "select_clips"),
        COUNT,
    ),
    **dict.fromkeys(
        ("lr", "adam_lr", "student_lr", "critic_lr", "discriminator_lr", "grad_clip"), RATE
    ),
    **dict.fromkeys(("shift", "timestep_shift", "regularise_sigma"), RATE),
    **dict.fromkeys(("muon_lr", "warmup", "guidance", "teacher_guidance"), WEIGHT),
    **dict.fromkeys(("asd_ratio", "asd_warmup", "r1_weight", "r2_weight"), WEIGHT),
    **dict.fromkeys(("ema_start", "select_every"), WEIGHT),
    **dict.fromkeys(("mixed_noise", "anchored_noise", "first_steps_share", "long_share"), SHARE),
    **dict.fromkeys(("later_share", "drop_prompt", "drop_attribute"), SHARE),
    "ema": DECAY,
    "betas": DECAYS,
    "step_weights": CHANCES,
}


def check_ranges(section: str, values: DataclassInstance) -> None:
    """Raise ConfigError for a number in a configuration's `section` that cannot be."""
    for field in fields(values):
        value = getattr(values, field.name)
        if value is None or field.name not in RULES:
            continue
        told, holds = RULES[field.name]
        if not holds(value):
            where = f"{section}: " if section else ""
            raise ConfigError(f"{where}{field.name} must be {told}, found {value!r}")
