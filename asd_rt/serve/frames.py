"""Frames as JPEG files."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 90
SMALL_PIXELS = 1 << 16  # of a frame; colours of small ones are not halved in size, which would show


def to_jpeg(frames: NDArray[np.uint8]) -> list[bytes]:
    """Each of `frames`, uint8 [F, H, W, 3], as a JPEG file."""
    subsampling = 0 if frames.shape[1] * frames.shape[2] <= SMALL_PIXELS else 2
    files = []
    for frame in frames:
        file = BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=QUALITY, subsampling=subsampling)
        files.append(file.getvalue())
    return files
