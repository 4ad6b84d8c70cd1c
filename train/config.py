"""Training configuration: frozen dataclasses read from one TOML file; unknown keys are errors."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from asd_rt.config import CacheConfig, ModelConfig, from_mapping
from asd_rt.errors import ConfigError


@dataclass(frozen=True)
class ClassifierConfig:
    """The judge: a small network that names digit, colour and direction of a clip."""

    steps: int
    batch: int
    lr: float


@dataclass(frozen=True)
class TeacherConfig:
    """Bidirectional teacher, trained by flow matching on real clips."""

    steps: int
    batch: int
    muon_lr: float
    adam_lr: float
    warmup: int
    ema: float
    shift: float
    mixed_noise: float
    anchored_noise: float
    later_share: float
    drop_prompt: float
    drop_attribute: float


@dataclass(frozen=True)
class InitConfig:
    """Causal initialisation: the teacher's weights learn to see only the past (teacher forcing)."""

    steps: int
    batch: int
    frames: int
    muon_lr: float
    adam_lr: float
    warmup: int
    ema: float


@dataclass(frozen=True)
class DistillConfig:
    """DMD and ASD on self-forcing rollouts. See train/distill.py for what each does."""

    steps: int
    batch: int
    frames: int
    student_lr: float
    critic_lr: float
    discriminator_lr: float
    betas: tuple[float, float]
    critic_updates: int
    guidance: float
    mixed_noise: float
    anchored_noise: float
    step_weights: tuple[float, ...]
    first_steps_share: float
    long_share: float
    asd_ratio: float
    asd_warmup: int
    r1_weight: float
    r2_weight: float
    regularise_sigma: float
    grad_clip: float
    ema: float
    ema_start: int

    def __post_init__(self) -> None:
        if len(self.step_weights) != 4 or min(self.step_weights) < 0 or sum(self.step_weights) <= 0:
            raise ConfigError(
                f"distill: step_weights must be 4 numbers >= 0, found {self.step_weights}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run needs; equal configurations and seeds give equal runs."""

    name: str
    timestep_shift: float
    clip_frames: int
    compile: bool
    eval_clips: int
    teacher_guidance: float  # of the teacher's own clips; the distillation has its own
    model: ModelConfig
    cache: CacheConfig
    classifier: ClassifierConfig
    teacher: TeacherConfig
    init: InitConfig
    distill: DistillConfig

    def __post_init__(self) -> None:
        block = self.cache.block_frames
        for name, frames in (
            ("clip_frames", self.clip_frames),
            ("init.frames", self.init.frames),
            ("distill.frames", self.distill.frames),
        ):
            if frames % block or frames < block:
                raise ConfigError(
                    f"{name} {frames} is not a multiple of cache.block_frames {block}"
                )
        if self.distill.frames < self.clip_frames:
            raise ConfigError(
                f"distill.frames {self.distill.frames} is smaller than clip_frames {self.clip_frames}"
            )

    def smoke(self) -> TrainConfig:
        """The same stages in a few steps each, to prove that they run (not that they learn)."""
        return replace(
            self,
            compile=False,
            eval_clips=16,
            classifier=replace(self.classifier, steps=12, batch=16),
            teacher=replace(self.teacher, steps=6, batch=4, warmup=2),
            init=replace(self.init, steps=4, batch=2, warmup=2),
            distill=replace(self.distill, steps=4, batch=2, asd_warmup=1, ema_start=1),
        )


_SECTIONS = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "classifier": ClassifierConfig,
    "teacher": TeacherConfig,
    "init": InitConfig,
    "distill": DistillConfig,
}


def load_config(path: Path) -> TrainConfig:
    """Read a training configuration.

    Raises:
        ConfigError: no such file, not TOML, or unknown, missing or impossible values.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file; shipped configurations are in train/configs/"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error
    missing = sorted({f.name for f in fields(TrainConfig)} - set(values))
    if missing:
        raise ConfigError(f"{path}: missing {', '.join(missing)}")
    for name, section in _SECTIONS.items():
        if not isinstance(values[name], dict):
            raise ConfigError(f"{path}: [{name}] must be a table, found {values[name]!r}")
        values[name] = from_mapping(section, values[name], f"{path} [{name}]")
    return from_mapping(TrainConfig, values, str(path))


_UPSTREAM: dict[str, tuple[str, ...]] = {
    "classifier": ("classifier", "clip_frames"),
    "teacher": ("model", "clip_frames", "teacher", "cache"),
    "init": ("model", "clip_frames", "teacher", "cache", "init"),
    "distill": (
        "model",
        "clip_frames",
        "teacher",
        "cache",
        "init",
        "distill",
        "timestep_shift",
    ),
}


def fingerprint(config: TrainConfig, seed: int, stage: str) -> str:
    """Hash of the seed and of every setting that the result of `stage` depends on."""
    settings = asdict(config)
    used = {"seed": seed, **{name: settings[name] for name in _UPSTREAM[stage]}}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:16]
