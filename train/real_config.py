"""Sections of a configuration that real networks need: data, weights, and how processes share a step."""

from __future__ import annotations

from dataclasses import dataclass

from asd_rt.errors import ConfigError
from train.deployment import check_latent_hw

PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is split and computed. With this section checkpoints are sharded.

    Attributes:
        micro_batches: of a step, each of the `batch` of its stage; processes share them evenly.
        checkpoint_activations: keep no activations of a transformer block, compute them twice.
        precision: of products: auto (bf16 where the machine has it), bf16 or fp32.
        save_minutes: between checkpoints.
    """

    micro_batches: int = 1
    checkpoint_activations: bool = False
    precision: str = "auto"
    save_minutes: float = 1.0

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise ConfigError(f"parallel: micro_batches must be >= 1, found {self.micro_batches}")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"parallel: precision must be one of {', '.join(PRECISIONS)}, found {self.precision!r}"
            )
        if not self.save_minutes >= 0:
            raise ConfigError(f"parallel: save_minutes must be >= 0, found {self.save_minutes}")


@dataclass(frozen=True)
class DataConfig:
    """What real networks are trained with; paths are relative to the working directory.

    Attributes:
        prompts: text file, one prompt a line.
        embeddings: of these prompts and of all captions, made by `asd-rt encode`.
        negative: embeddings file whose first prompt guidance leads away from; also what a prompt that is
            left out is replaced by.
        latent_hw: height and width of latents.
        clips: folder made by train.clips, to train a teacher and to teach it to see only the past.
        ode_pairs: folder made by train.ode_pairs, for the causal initialisation instead of clips.
    """

    prompts: str
    embeddings: str
    negative: str
    latent_hw: tuple[int, int]
    clips: str = ""
    ode_pairs: str = ""

    def __post_init__(self) -> None:
        check_latent_hw(self.latent_hw, "data: latent_hw")


@dataclass(frozen=True)
class WeightsConfig:
    """Checkpoints, in any format of docs/checkpoints.md, that real networks start from.

    Attributes:
        teacher: the many-step model.
        student: causal start of the distillation, or what the causal initialisation starts from.
        critic: of the student's shape; empty = the teacher's weights.
    """

    teacher: str
    student: str
    critic: str = ""
