"""How likely a lookup's token is accepted, by the class of the statistics behind it.

`suffix_kernels.evidence_of` gives the class of a continuation in the row's own text; that of a
continuation in answers to others is NUM_EVIDENCE higher, since they say less about this text. The
chances here are assumed before any replay; a cascade calibrates its own.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_EVIDENCE: Final = 128
"""Number of classes in one source."""

NUM_CLASSES: Final = 2 * NUM_EVIDENCE
# the middles of the classes' lengths of context, numbers of occurrences and shares of them
_LENGTHS: Final = (1.0, 2.0, 3.0, 4.0, 5.5, 8.0, 12.0, 20.0)
_TOTALS: Final = (1.0, 2.0, 4.0, 8.0)
_SHARES: Final = (0.25, 0.55, 0.85, 1.0)


@cache
def assumed_chances() -> NDArray[np.float64]:
    """Return [NUM_CLASSES] chances that a token is accepted if its parent is; do not write to it.

    A context of l tokens that occurred once is continued alike with a chance of 1 - 0.64 / l^0.8 in the
    row's own text and 1 - 0.8 / l^0.35 in other answers. The chance of another continuation falls with
    the number of occurrences, up to 4 of them; a token with the share s of them has s^1.5 of the chance.
    Fitted to replays of `suffix_lookup` on translations, word problems, code and summaries.
    """
    length, total, share = np.meshgrid(_LENGTHS, _TOTALS, _SHARES, indexing="ij")
    sources = []
    for factor, power in ((0.64, 0.8), (0.8, 0.35)):
        missing = factor / length**power / np.minimum(total, 4.0)
        sources.append(((1.0 - missing) * share**1.5).ravel())
    chances = np.concatenate(sources)
    chances.setflags(write=False)
    return chances
