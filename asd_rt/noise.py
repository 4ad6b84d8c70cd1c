"""Counter-based Gaussian noise: the same (seed, block, step) gives the same values on every machine."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import ConfigError

FloatArray = NDArray[np.float32]
Key = tuple[int, int]  # block, step
MAX_SEED = 2**63 - 1
AHEAD_BLOCKS = 8
AHEAD_VALUES = 2**17  # not more, for it delays the block that needs the first of them


def check_seed(seed: object) -> int:
    """`seed` as an int in 0 .. 2**63 - 1.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be a whole number from 0 to {MAX_SEED}, found {seed!r}")
    return seed


def gaussian(shape: tuple[int, ...], seed: int, block: int, step: int) -> FloatArray:
    """Standard normal values for one denoising step of one block.

    Raw Philox4x64 words keyed by (seed, block and step), made normal by Box-Muller in float64 and
    rounded to multiples of 2**-20, so that last-bit differences between math libraries vanish.
    numpy's own `standard_normal` is not used: its stream may change between versions.

    Args:
        shape: of the result.
        seed: 0 .. 2**63 - 1.
        block: index of the block.
        step: 0 for the block's first noise, i + 1 for the fresh noise after step i.
    """
    count = prod(shape)
    pairs = (count + 1) // 2
    words = np.random.Philox(key=[seed, (block << 8) | step]).random_raw(2 * pairs)
    words >>= np.uint64(11)
    uniform = words.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-53
    radius, angle = uniform[:pairs], uniform[pairs:]
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    radius *= 2.0**20
    angle *= 2.0 * np.pi
    values = np.empty_like(uniform)
    np.cos(angle, out=values[:pairs])
    np.sin(angle, out=values[pairs:])
    values[:pairs] *= radius
    values[pairs:] *= radius
    np.rint(values, out=values)
    values *= 2.0**-20
    return values[:count].astype(np.float32).reshape(shape)


class NoiseAhead:
    """The noise of one video, drawn for several blocks at once where blocks are small.

    Between two passes, code and tables for it have left the processor's caches: one by one, small blocks
    take three times as long. What is drawn is what `gaussian` gives, in whatever order it is asked for.
    """

    def __init__(self, shape: tuple[int, ...], seed: int, first: int, last: int) -> None:
        """Of blocks `first` to `last`, each of `shape`."""
        self._shape, self._seed, self._first, self._last = shape, seed, first, last
        self._ahead = min(AHEAD_BLOCKS, AHEAD_VALUES // max(1, prod(shape)))
        self._held: dict[Key, FloatArray] = {}

    def draw(self, block: int, steps: Collection[int]) -> dict[int, FloatArray]:
        """The noise of these steps of `block`, by step; forgets that of blocks before."""
        keys = [(block, step) for step in steps if (block, step) not in self._held]
        if (block, 0) in keys and block != self._first:  # nothing delays the first frame
            after = range(block + 1, min(block + self._ahead, self._last + 1))
            keys += [(later, 0) for later in after]
        if keys:
            self._held |= {key: gaussian(self._shape, self._seed, *key) for key in keys}
        found = {step: self._held[block, step] for step in steps}
        self._held = {key: noise for key, noise in self._held.items() if key[0] > block}
        return found
