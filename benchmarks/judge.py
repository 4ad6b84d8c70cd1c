"""The judge of the tiny world for benchmarks: the recipe's classifier, and the shipped student's codec."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.build import default_checkpoint
from export.semantics import trained_judge
from train.checkpoint import load_checkpoint
from train.classifier import Classifier
from train.codec import LinearCodec
from train.config import TrainConfig
from train.evaluate import judge, same_axes

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


def load_judge(config: TrainConfig | None = None) -> Judge:
    """The judge, trained when it is first needed: see `export.semantics.trained_judge`."""
    codec = load_checkpoint(default_checkpoint()).codec
    if codec is None:
        raise ValueError(f"{default_checkpoint()}: the shipped student has no codec")
    return Judge(trained_judge(codec, config).requires_grad_(False), codec)
