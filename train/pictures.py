"""Contact sheets: clips as rows, time running to the right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from asd_rt.files import replacing


def contact_sheet(
    frames: Tensor, path: Path, every: int = 2, scale: int = 2, columns: int = 2
) -> None:
    """Write clips float [N, F, 3, H, W] in 0..1 as a PNG: every `every`-th frame, gutters between."""
    from PIL import Image

    clips = frames[:, ::every].permute(0, 1, 3, 4, 2).clamp(0, 1).numpy()
    count, length, height, width, _ = clips.shape
    rows = -(-count // columns)
    gap = 2
    sheet = np.full((rows * (height + gap) + gap, columns * (length * (width + gap) + 8), 3), 0.35)
    for i, clip in enumerate(clips):
        top = gap + (i % rows) * (height + gap)
        left = gap + (i // rows) * (length * (width + gap) + 8)
        for j, frame in enumerate(clip):
            x = left + j * (width + gap)
            sheet[top : top + height, x : x + width] = frame
    image = Image.fromarray((sheet * 255).astype(np.uint8))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
