"""The judge of the tiny world for benchmarks: the recipe's classifier, trained once and kept in a folder.

It is trained on real clips alone, with the configuration and seed of the shipped student's recipe, and takes
about a minute on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.checkpoint import load_checkpoint
from train.classifier import Classifier, ClassifierStage
from train.codec import LinearCodec
from train.config import load_config
from train.evaluate import judge, same_axes
from train.pipeline import fingerprint
from train.stage import run_stage

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "train/configs/tiny.toml"
STUDENT = ROOT / "train/tiny_student"
NAMES = (
    "digit",
    "colour",
    "axes",
)  # a digit may have turned round, so only the axes of its motion count


@dataclass(frozen=True)
class Judge:
    """A trained classifier, and the codec of the student that it judges."""

    classifier: Classifier
    codec: LinearCodec

    def frames(self, latents: NDArray[np.float32]) -> Tensor:
        """Latents [N, F, C, 8, 8] as frames [N, F, 3, 32, 32] in 0..1."""
        return self.codec.decode(torch.from_numpy(latents))

    def hits(self, frames: Tensor, labels: Tensor) -> NDArray[np.bool_]:
        """Which of `labels` [N, 3] (digit, colour, direction) clips show: bool [N, 3], see NAMES."""
        found, _ = judge(self.classifier, frames)
        hits = (found == labels).numpy()
        hits[:, 2] = same_axes(found[:, 2], labels[:, 2]).numpy()
        return hits


def load_judge(folder: Path, steps: int | None = None, seed: int = 0) -> Judge:
    """The judge kept in `folder`, trained there where it is not.

    Args:
        folder: of the judge, made if absent.
        steps: of its training; None = the recipe's. Another number asks for another folder.
        seed: of its training.

    Raises:
        ConfigError: the folder holds a judge that was made otherwise.
    """
    from dataclasses import replace

    config = load_config(RECIPE)
    if steps is not None:
        config = replace(config, classifier=replace(config.classifier, steps=steps))
    codec = load_checkpoint(STUDENT).codec
    if codec is None:
        raise ValueError(f"{STUDENT}: the shipped student has no codec")
    folder.mkdir(parents=True, exist_ok=True)
    stage = ClassifierStage(config, seed, codec)
    run_stage(stage, folder, fingerprint(config, seed, stage.name))
    return Judge(stage.model.eval().requires_grad_(False), codec)
