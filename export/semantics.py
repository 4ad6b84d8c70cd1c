"""Whether the tiny world's videos still show what was asked for: an engine beside float32 torch.

The judge is that of `train.judge`. Both sides get the same prompts and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asd_rt.arguments import make_plan
from asd_rt.backends.base import Engine
from asd_rt.errors import OutputError
from asd_rt.frame_loop import Request
from asd_rt.progress import Progress
from export.drift import play
from train.checkpoint import Checkpoint
from train.judge import Judge
from train.scores import BOOTSTRAP
from train.tiny_world import label_tokens, random_labels

FRAMES = 48
CLIP = 12  # frames that are judged at a time
BATCH = 16
PROMPTS_SEED, NOISE_SEED = 4242, 10_000
ATTRIBUTES = ("digit", "colour", "direction")


@dataclass(frozen=True)
class Marks:
    """What the judge finds in videos.

    Attributes:
        right: bool [videos, FRAMES / CLIP, 3]: digit, colour and direction of each clip of CLIP frames. A
            digit may turn round after the first clip: from then on only the axes of its motion count.
    """

    right: NDArray[np.bool_]

    @property
    def score(self) -> NDArray[np.float64]:
        """Share of right answers of each video, the semantic score."""
        share: NDArray[np.float64] = self.right.mean(axis=(1, 2))
        return share

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        whole = self.right.all(axis=2).mean(axis=0)
        single = self.right.mean(axis=(0, 1))
        return {
            "score": round(float(self.score.mean()), 4),
            **{name: round(float(x), 4) for name, x in zip(ATTRIBUTES, single, strict=True)},
            "all_right_first_frames": round(float(whole[0]), 4),
            "all_right_last_frames": round(float(whole[-1]), 4),
        }


def show(engine: Engine, checkpoint: Checkpoint, judge: Judge, prompts: int, name: str) -> Marks:
    """Let an engine play `prompts` videos of FRAMES frames by its own plan, and judge them.

    Latents are decoded by torch on either side: the decoder is measured apart.
    """
    manifest, codec, table = engine.manifest, checkpoint.codec, checkpoint.table
    if codec is None or table is None:
        raise OutputError(f"{checkpoint.name}: is no student of the tiny world")
    labels = random_labels(prompts, torch.Generator().manual_seed(PROMPTS_SEED))
    size = manifest.cache.block_frames
    blocks = -(-FRAMES // size)
    batches = [labels[i : i + BATCH] for i in range(0, prompts, BATCH)]
    found = []
    with Progress(f"{name}: judged videos", len(batches) * blocks) as progress:
        for number, asked in enumerate(batches):
            context = table[label_tokens(asked, manifest.model.text_len)].numpy()
            shape = (len(asked), blocks * size, manifest.model.in_dim, 8, 8)
            plan = make_plan(manifest, None, None)
            parts = []
            for block in play(engine, Request(context, shape, plan, NOISE_SEED + number)):
                parts.append(torch.from_numpy(block.latents.copy()))
                progress.advance()
            frames = codec.decode(torch.cat(parts, dim=1)[:, :FRAMES])
            found.append(_mark(judge, frames, asked))
    return Marks(np.concatenate(found))


def _mark(judge: Judge, frames: Tensor, asked: Tensor) -> NDArray[np.bool_]:
    """Frames [B, FRAMES, 3, 32, 32] and what was asked for [B, 3] -> bool [B, FRAMES / CLIP, 3]."""
    marks = []
    for number in range(FRAMES // CLIP):
        clip = frames[:, number * CLIP : (number + 1) * CLIP]
        marks.append(judge.hits(clip.nan_to_num(), asked, later=number > 0))
    return np.stack(marks, axis=1)


def compare(found: Marks, expected: Marks, seed: int = 0) -> dict[str, Any]:
    """The score of an engine beside float32 torch's, and their difference over the same prompts.

    Returns:
        both, with "difference" (engine less torch) and its 95 % bootstrap interval over prompts, in points
        (hundredths).
    """
    gaps = 100 * (found.score - expected.score)
    draws = np.random.default_rng(seed).integers(0, len(gaps), (BOOTSTRAP, len(gaps)))
    low, high = np.percentile(gaps[draws].mean(axis=1), [2.5, 97.5])
    return {
        "prompts": len(gaps),
        "frames": FRAMES,
        "engine": found.to_json(),
        "torch": expected.to_json(),
        "difference_points": round(float(gaps.mean()), 2),
        "interval_points": [round(float(low), 2), round(float(high), 2)],
    }
