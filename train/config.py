"""Training configuration: frozen dataclasses read from one TOML file; unknown keys are errors."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from asd_rt.config import CacheConfig, ModelConfig, from_mapping
from asd_rt.errors import ConfigError
from train.ranges import check_ranges
from train.real_config import DataConfig, ParallelConfig, WeightsConfig

Made = TypeVar("Made")


@dataclass(frozen=True)
class ClassifierConfig:
    """The judge: a small network that names digit, colour and direction of a clip."""

    steps: int
    batch: int
    lr: float

    def __post_init__(self) -> None:
        check_ranges("classifier", self)


@dataclass(frozen=True)
class TeacherConfig:
    """Bidirectional teacher, trained by flow matching on real clips. Without a muon_lr AdamW trains all."""

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

    def __post_init__(self) -> None:
        check_ranges("teacher", self)


@dataclass(frozen=True)
class InitConfig:
    """Causal initialisation: the teacher's weights learn to see only the past.

    By teacher forcing on clips, or where data.ode_pairs is named by regression to what the teacher made of
    the same noise.
    """

    steps: int
    batch: int
    frames: int
    muon_lr: float
    adam_lr: float
    warmup: int
    ema: float

    def __post_init__(self) -> None:
        check_ranges("init", self)


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
    select_every: int = 0  # steps between looks at held-out prompts; 0 = keep the last average
    select_clips: int = 64

    def __post_init__(self) -> None:
        check_ranges("distill", self)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run needs; equal configurations and seeds give equal runs.

    Without [data] the run is of the tiny world, and needs all of its sections. With [data] it is of real
    networks: [weights] says what they start from, and the stages are those whose sections are there.
    """

    name: str
    timestep_shift: float
    clip_frames: int
    model: ModelConfig
    cache: CacheConfig
    distill: DistillConfig
    compile: bool = False
    eval_clips: int | None = None
    teacher_guidance: float | None = (
        None  # of the teacher's own clips; the distillation has its own
    )
    classifier: ClassifierConfig | None = None
    teacher: TeacherConfig | None = None
    init: InitConfig | None = None
    teacher_model: ModelConfig | None = None  # None = the student's
    data: DataConfig | None = None
    weights: WeightsConfig | None = None
    parallel: ParallelConfig | None = None

    def __post_init__(self) -> None:
        check_ranges("", self)
        self._check_sections()
        block = self.cache.block_frames
        for name, frames in (
            ("clip_frames", self.clip_frames),
            ("init.frames", self.init.frames if self.init else block),
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

    def _check_sections(self) -> None:
        """Raise ConfigError for sections that do not belong together."""
        tiny = ("eval_clips", "teacher_guidance", "classifier", "teacher", "init")
        if self.data is None:
            missing = [name for name in tiny if getattr(self, name) is None]
            if missing:
                raise ConfigError(f"missing {', '.join(missing)} (or [data], for real networks)")
            extra = [
                n for n in ("teacher_model", "weights", "parallel") if getattr(self, n) is not None
            ]
            if extra:
                raise ConfigError(f"{', '.join(extra)}: only for real networks, which need [data]")
            return
        if self.distill.select_every:
            raise ConfigError("distill.select_every: only the tiny world has a judge; set it to 0")
        if self.weights is None:
            raise ConfigError("missing weights: with [data], networks start from checkpoints")
        extra = [n for n in ("eval_clips", "teacher_guidance", "classifier") if getattr(self, n)]
        if extra:
            raise ConfigError(f"{', '.join(extra)}: only for the tiny world, which has no [data]")
        if self.teacher is not None and not self.data.clips:
            raise ConfigError("the stage teacher needs data.clips, made by python -m train.clips")
        if self.init is not None and not self.data.clips and not self.data.ode_pairs:
            raise ConfigError("the stage init needs data.clips or data.ode_pairs")
        teacher = self.teacher_model or self.model
        for name in ("in_dim", "out_dim", "text_dim"):
            if getattr(teacher, name) != getattr(self.model, name):
                raise ConfigError(
                    f"teacher_model.{name} {getattr(teacher, name)} differs from model.{name} "
                    f"{getattr(self.model, name)}: teacher and student must share latents and prompts"
                )
        if not self.one_shape and not self.weights.critic:
            raise ConfigError(
                "missing weights.critic: the teacher has another shape than the student, so the critic "
                "cannot start from its weights"
            )

    @property
    def one_shape(self) -> bool:
        """Whether the weights of teacher and student have the same shapes."""
        other = self.teacher_model or self.model
        window = {"local_attn_size": self.model.local_attn_size, "sink_size": self.model.sink_size}
        return replace(other, **window) == self.model

    def smoke(self) -> TrainConfig:
        """The same stages in a few steps each, to prove that they run (not that they learn)."""
        return replace(
            self,
            compile=False,
            eval_clips=16 if self.eval_clips else None,
            classifier=self.classifier and replace(self.classifier, steps=12, batch=16),
            teacher=self.teacher and replace(self.teacher, steps=6, batch=4, warmup=2),
            init=self.init and replace(self.init, steps=4, batch=2, warmup=2),
            distill=replace(
                self.distill,
                steps=4,
                batch=2,
                asd_warmup=1,
                ema_start=1,
                select_every=2 if self.distill.select_every else 0,
                select_clips=4,
            ),
        )


_SECTIONS = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "classifier": ClassifierConfig,
    "teacher": TeacherConfig,
    "init": InitConfig,
    "distill": DistillConfig,
    "teacher_model": ModelConfig,
    "data": DataConfig,
    "weights": WeightsConfig,
    "parallel": ParallelConfig,
}


def load_config(path: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a training configuration.

    Args:
        path: TOML file.
        changes: "section.key=value" each, to be set over the file's; a value that is no TOML is a text.

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
    for change in changes:
        _set(values, change)
    missing = {f.name for f in fields(TrainConfig) if f.default is MISSING} - set(values)
    if missing:
        raise ConfigError(f"{path}: missing {', '.join(sorted(missing))}")
    for name, section in _SECTIONS.items():
        if name not in values:
            continue
        if not isinstance(values[name], dict):
            raise ConfigError(f"{path}: [{name}] must be a table, found {values[name]!r}")
        _check_types(section, values[name], f"{path} [{name}]")
        values[name] = _made(section, values[name], path, f"{path} [{name}]")
    _check_types(TrainConfig, values, str(path))
    return _made(TrainConfig, values, path, str(path))


def _made(kind: type[Made], values: dict[str, Any], path: Path, where: str) -> Made:
    """A part of a configuration; errors name its file."""
    try:
        return from_mapping(kind, values, where)
    except ConfigError as error:
        told = "" if str(error).startswith(str(path)) else f"{path}: "
        raise ConfigError(f"{told}{error}") from error


def _set(values: dict[str, Any], change: str) -> None:
    """Set one "section.key=value" in what was read from a file."""
    key, equals, text = change.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name or len(sections) > 1:
        raise ConfigError(f"--set {change}: expected section.key=value, such as model.num_layers=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {change}: {section} is no section")
    values[name] = value


_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "tuple[float, float]": (list, "a list of numbers"),
    "tuple[float, ...]": (list, "a list of numbers"),
    "tuple[int, int]": (list, "a list of numbers"),
}


def _check_types(section: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for values of another type than the fields of `section` have."""
    for field in fields(section):
        kind, name = _TYPES.get(str(field.type).removesuffix(" | None"), (object, ""))
        value = values.get(field.name)
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if isinstance(value, list):
            wrong |= any(type(number) not in (int, float) for number in value)
        if field.name in values and name and wrong:
            raise ConfigError(f"{where}: {field.name} must be {name}, found {value!r}")


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
    # What came later counts where it is there, so that older runs go on.
    later = {name: settings[name] for name in ("teacher_model", "data", "weights")}
    used |= {name: value for name, value in later.items() if value is not None}
    if stage == "init" and config.data is not None:  # the tiny world's older runs go on
        used["timestep_shift"] = config.timestep_shift
    if config.parallel is not None:
        used["micro_batches"] = config.parallel.micro_batches
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:16]
