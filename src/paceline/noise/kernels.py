"""The race of `paceline.noise` as machine code: one draw from one distribution.

A token can win only if p / e is above the best so far, and its noise e is never below its uniform u. So
few tokens need a logarithm, and no array of the vocabulary's size is stored.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from paceline.compiled import compiled

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


@compiled
def _mix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def race(probs: np.ndarray, seed: np.uint64, position: np.uint64, stream: np.uint64) -> int:
    """Return the winner among probs [V] float32; -1 if no token is possible."""
    best, winner = np.float32(0.0), -1
    bits = _mix(_mix(seed + _GOLDEN * stream) + _GOLDEN * (position + np.uint64(1)))
    for token in range(len(probs)):
        bits += _GOLDEN
        p = probs[token]
        if p <= np.float32(0.0):
            continue
        u = (np.float32(_mix(bits) >> np.uint64(11)) + np.float32(0.5)) * np.float32(2.0**-53)
        u = min(u, np.float32(1.0 - 2.0**-24))
        if p <= best * u:
            continue
        ratio = p / -np.log1p(-u)
        if ratio > best:
            best, winner = ratio, token
    return winner
