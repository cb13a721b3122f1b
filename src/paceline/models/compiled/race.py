"""The race of `paceline.noise` within a chain: a draw from softmax(logits / temperature).

The winner of the race argmax(p / e) has the largest logit / temperature - log(e), so no softmax is
needed. A token's noise e is never below its uniform u, whose exponent bounds the logarithm: few tokens
need one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from paceline.models.compiled.memory import field, float_field, get_f32, put_f32, put_int
from paceline.models.compiled.tables import COLDNESS_F, DRAWN_AT, SEED
from paceline.models.compiled.vectors import compiled, exponent
from paceline.noise import TARGET
from paceline.noise.kernels import GOLDEN, bits_at, mix

_LN2: Final = np.float32(0.6931472)


@compiled
def note_winner(span, tile, best, first_id):
    """Write the score and id of the winner among 64 logits at `best`; nan if a logit is nan.

    span: the row's table. first_id: of the first logit; later ids have the later ones.
    """
    coldness = float_field(span, COLDNESS_F)
    most, found = np.float32(-np.inf), 0
    bits = bits_at(
        np.uint64(field(span, SEED)), np.uint64(field(span, DRAWN_AT)), np.uint64(TARGET)
    ) + GOLDEN * np.uint64(first_id)
    for k in range(64):
        bits += GOLDEN
        score = get_f32(tile + 4 * k) * coldness
        if score != score:
            most = score
            break
        u = (np.float32(mix(bits) >> np.uint64(11)) + np.float32(0.5)) * np.float32(2.0**-53)
        u = min(u, np.float32(1.0 - 2.0**-24))
        if score - np.float32(exponent(u)) * _LN2 <= most:
            continue
        score -= np.log(-np.log1p(-u))
        if score > most:
            most, found = score, k
    put_f32(best, most)
    put_int(best + 8, first_id + found)
