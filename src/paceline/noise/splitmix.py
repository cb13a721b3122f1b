"""splitmix64's mixing function, the base of random numbers and hash places.

Plain numpy on uint64 scalars and arrays; `noise.kernels.mix` is the same function compiled. Tensors have
their own form in `paceline.noise`, because torch's uint64 lacks the arithmetic.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


def mix(x: Any) -> Any:
    """Return x with every bit depending on every bit of the argument; wraps at 2**64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
