"""Seconds of a round without its drafting, by the tokens that all rows draft together, read fast.

The engine divides a round's verified tokens among its rows by these prices. This module knows no engine.
Symbols: R rows, N drafted tokens of all rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.costs.table import ENGINE, FORWARD, ROUND, TARGET
from paceline.errors import ArtefactError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.costs.table import CostTable

_BUCKET: Final = 128  # consecutive contexts that share one price, that of their middle
_LEAST: Final = 64  # drafted tokens that are read at once


class RoundSeconds:
    """The target's forward and the engine's part of a round; each (rows, context) is read once."""

    def __init__(self, costs: CostTable) -> None:
        """Raise ArtefactError if the table has no prices of rounds of several rows."""
        costs.check(())
        forwards = [m for m in costs.measurements if (m.subject, m.operation) == (TARGET, FORWARD)]
        if max(m.rows for m in forwards) == 1:
            raise ArtefactError(
                "cost table: only forwards of one row were measured; set engine.max_rows to the number "
                "of rows to serve and run `paceline profile` again"
            )
        self._costs = costs
        self._read: dict[tuple[int, int], NDArray[np.float64]] = {}

    def up_to(self, rows: int, context: int, num_drafted: int) -> NDArray[np.float64]:
        """Return the seconds of rounds that draft 0, 1, ... tokens in all, at least [N + 1].

        rows: R. context: mean number of cached tokens per row. num_drafted: N. Do not write to the
        array. Seconds never fall with the number of tokens: where measured ones do, they are replaced by
        the mean of the largest before and the least after.
        """
        key = rows, context // _BUCKET
        seconds = self._read.get(key)
        if seconds is None or len(seconds) <= num_drafted:
            longest = max(_LEAST, 2 * num_drafted)
            middle = key[1] * _BUCKET + _BUCKET // 2
            tokens = 1 + np.arange(longest + 1)
            forward = self._costs.seconds(TARGET, FORWARD, tokens, middle, rows)
            host = self._costs.seconds(ENGINE, ROUND, 0, 0, rows)
            rising = np.maximum.accumulate(forward) + np.minimum.accumulate(forward[::-1])[::-1]
            seconds = self._read[key] = rising / 2 + host
        return seconds
