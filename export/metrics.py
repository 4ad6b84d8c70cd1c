"""How far apart two results are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def relative_l2(found: Array, expected: Array) -> float:
    """|found - expected| / |expected| in float64; infinite where a value is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-12))


def short(value: float | None) -> float | None:
    """Three digits, for reports; None for what is no finite number, which JSON does not have."""
    return float(f"{value:.3g}") if value is not None and np.isfinite(value) else None
