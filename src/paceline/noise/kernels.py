"""The race of `paceline.noise` as machine code: one draw from one distribution.

A token can win only if p / e is above the best so far, and its noise e is never below its uniform u. So
few tokens need a logarithm, and no array of the vocabulary's size is stored.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from paceline.compiled import compiled
from paceline.noise import splitmix

GOLDEN: Final = splitmix.GOLDEN

# The compiled code on disk of a module that calls these two is not renewed when they change. Whoever
# changes them must also change this module, drafting/suffix_kernels.py and drafting/trigram/kernels.py.
mix = compiled(splitmix.mix)


@compiled
def bits_at(seed: np.uint64, position: np.uint64, stream: np.uint64) -> np.uint64:
    """Return 64 random bits as a function of all three; the start of further numbers."""
    bits: np.uint64 = mix(mix(seed + GOLDEN * stream) + GOLDEN * (position + np.uint64(1)))
    return bits


@compiled
def race(probs: np.ndarray, seed: np.uint64, position: np.uint64, stream: np.uint64) -> int:
    """Return the winner among probs [V] float32; -1 if no token is possible."""
    best, winner = np.float32(0.0), -1
    bits = bits_at(seed, position, stream)
    for token in range(len(probs)):
        bits += GOLDEN
        p = probs[token]
        if p <= np.float32(0.0):
            continue
        u = (np.float32(mix(bits) >> np.uint64(11)) + np.float32(0.5)) * np.float32(2.0**-53)
        u = min(u, np.float32(1.0 - 2.0**-24))
        if p <= best * u:
            continue
        ratio = p / -np.log1p(-u)
        if ratio > best:
            best, winner = ratio, token
    return winner
