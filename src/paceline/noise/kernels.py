"""The race of `paceline.noise` as machine code: one draw from one distribution.

A token can win only with p / e above the best so far, and its noise e is never below its uniform u. So
all but a few tokens are settled without a logarithm, and nothing of the vocabulary's size is stored.
"""

from __future__ import annotations

import numpy as np

from paceline.compiled import compiled


@compiled
def race(probs: np.ndarray, base: int, golden: int) -> int:
    """The winner among probs [V] float32. base: uint64 bits of seed, position and stream."""
    best, winner = np.float32(0.0), 0
    bits = np.uint64(base)
    for token in range(len(probs)):
        bits += np.uint64(golden)
        p = probs[token]
        if p <= np.float32(0.0):
            continue
        x = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
        u = (np.float32(x >> np.uint64(11)) + np.float32(0.5)) * np.float32(2.0**-53)
        u = min(u, np.float32(1.0 - 2.0**-24))
        if p <= best * u:
            continue
        ratio = p / -np.log1p(-u)
        if ratio > best:
            best, winner = ratio, token
    return winner
