"""The judge of the tiny world: one classifier for all students, engines and reports.

It sees real clips alone (`train.classifier`). No checkpoint ships it: it is trained when it is first
needed (a minute or two) and kept in the cache folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asd_rt.errors import OutputError
from asd_rt.files import cache_folder
from train.classifier import Classifier, ClassifierStage
from train.codec import LinearCodec
from train.config import TrainConfig, fingerprint, load_config
from train.stage import run_stage
from train.tiny_world import DIRECTIONS, TinyWorld

SEED = 0  # of the judge, whatever the seed of what it judges
BATCH = 64
ATTRIBUTES = ("digit", "colour", "motion")


def shipped_recipe() -> TrainConfig:
    """The configuration of the shipped student."""
    return load_config(Path(__file__).parent / "configs" / "tiny.toml")


@dataclass(frozen=True, eq=False)
class Judge:
    """A trained classifier.

    Attributes:
        classifier: names digit, colour and direction.
        codec: between frames and latents; the one whose losses it was trained to overlook.
    """

    classifier: Classifier
    codec: LinearCodec

    def frames(self, latents: NDArray[np.float32]) -> Tensor:
        """Latents [N, F, C, 8, 8] as frames [N, F, 3, 32, 32] in 0..1."""
        return self.codec.decode(torch.from_numpy(latents))

    @torch.no_grad()
    def look(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [N, F, 3, 32, 32] -> (labels int64 [N, 3] found in them, features [N, D])."""
        labels, features = [], []
        for part in frames.split(BATCH):
            labels.append(torch.stack([x.argmax(1) for x in self.classifier(part)], dim=1))
            features.append(self.classifier.features(part))
        return torch.cat(labels), torch.cat(features)

    def hits(self, frames: Tensor, labels: Tensor, later: bool = False) -> NDArray[np.bool_]:
        """Which of `labels` [N, 3] (digit, colour, direction) clips show: bool [N, 3].

        Args:
            frames: [N, F, 3, 32, 32] in 0..1.
            labels: what was asked for.
            later: clips from later in a video, where digits may have turned round: only axes count.
        """
        return right(self.look(frames)[0], labels, later)


def right(found: Tensor, labels: Tensor, later: bool = False) -> NDArray[np.bool_]:
    """Which labels [N, 3] are those asked for; see `Judge.hits`."""
    hits = (found == labels).numpy()
    if later:
        hits[:, 2] = same_axes(found[:, 2], labels[:, 2]).numpy()
    return hits


def same_axes(found: Tensor, wanted: Tensor) -> Tensor:
    """Whether directions [N] move along the same axes, whatever way round: bool [N]."""
    axes = torch.tensor(list(DIRECTIONS.values())).abs()
    return (axes[found] == axes[wanted]).all(dim=1)


def load_judge(config: TrainConfig | None = None) -> Judge:
    """The judge, from the cache folder, or trained now, with a progress bar.

    Args:
        config: the recipe; None = the shipped student's.

    Raises:
        OutputError: there is no cache folder, or it cannot be written.
        AsdError: what is kept there is damaged.
    """
    config = shipped_recipe() if config is None else config
    codec = LinearCodec(config.model.in_dim)
    codec.fit(TinyWorld("train"), SEED)
    known = hashlib.sha256(codec.encoder.numpy().tobytes() + codec.decoder.numpy().tobytes())
    mark = f"{fingerprint(config, SEED, 'classifier')}-{known.hexdigest()[:8]}"
    cache = cache_folder()
    if cache is None:
        raise OutputError(
            "the judge of the tiny world needs a folder to be kept in; name one: ASD_RT_CACHE=FOLDER"
        )
    folder = cache / "judge" / mark
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made ({error.strerror}); name another cache: ASD_RT_CACHE=FOLDER"
        ) from error
    with torch.random.fork_rng():
        stage = ClassifierStage(config, SEED, codec)
        run_stage(stage, folder, mark)
    # The stage's own network is that of its last step, or what it read back.
    return Judge(stage.model.eval().requires_grad_(False), codec)
