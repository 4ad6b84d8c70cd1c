"""Counter-based Gaussian noise: the same (seed, block, step) gives the same values on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import ConfigError

MAX_SEED = 2**63 - 1


def check_seed(seed: object) -> int:
    """`seed` as an int in 0 .. 2**63 - 1.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be a whole number from 0 to {MAX_SEED}, found {seed!r}")
    return seed


def gaussian(shape: tuple[int, ...], seed: int, block: int, step: int) -> NDArray[np.float32]:
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
    count = int(np.prod(shape))
    pairs = (count + 1) // 2
    bits = np.random.Philox(key=[seed, (block << 8) | step])
    words = bits.random_raw(2 * pairs)
    words >>= np.uint64(11)
    uniform = words.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-53
    radius, angle = uniform[:pairs], uniform[pairs:]
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle *= 2.0 * np.pi
    values = np.empty(2 * pairs)
    np.multiply(np.cos(angle), radius, out=values[:pairs])
    np.multiply(np.sin(angle), radius, out=values[pairs:])
    values *= 2.0**20
    np.rint(values, out=values)
    values *= 2.0**-20
    return values[:count].astype(np.float32).reshape(shape)
