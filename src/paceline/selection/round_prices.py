"""What a round costs, arm by arm, while a request is decoded: the cost table, read fast.

Knows no request and no policy. Objectives are those of `costs.pricing`: a row's own wait, the
machine's seconds for each row, or a mixture. Symbols: K a drafter's full length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from paceline.contracts import NONE
from paceline.costs.pricing import by_objective, round_seconds
from paceline.costs.table import PROPOSE, START

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from paceline.costs.pricing import Objective
    from paceline.costs.table import CostTable


class RoundPrices(Protocol):
    """Seconds of what a request may do next, at a context and with so many rows in flight.

    bucket: so many contexts in a row are priced alike.
    """

    @property
    def bucket(self) -> int: ...

    def rounds(self, drafter: str, context: int, rows: int) -> NDArray[np.float64]:
        """[K+1] a whole round of each number of drafted tokens; the arrays are shared, not copies."""

    def drafting(self, drafter: str, drafted: int, context: int) -> float:
        """A proposal alone, which is what a draft made beside the arm in use costs."""

    def catching_up(self, drafter: str, num_tokens: int) -> float:
        """Reading so many tokens that the drafter has not seen."""


class TablePrices:
    """`RoundPrices` from a cost table; each (drafter, context, rows) is interpolated once.

    A context is priced as the middle of its bucket: within 64 tokens a forward's price hardly moves.
    """

    bucket: Final = 64

    def __init__(
        self, costs: CostTable, lengths: Mapping[str, int], objective: Objective = "latency"
    ) -> None:
        """lengths: drafter -> K."""
        self._costs = costs
        self._lengths = {**lengths, NONE: 0}
        self._objective = objective
        self._rounds: dict[tuple[str, int, int], NDArray[np.float64]] = {}
        self._drafting: dict[tuple[str, int], NDArray[np.float64]] = {}
        self._catching_up: dict[tuple[str, int], float] = {}

    def rounds(self, drafter: str, context: int, rows: int) -> NDArray[np.float64]:
        key = (drafter, context // self.bucket, rows)
        found = self._rounds.get(key)
        if found is None:
            middle = context // self.bucket * self.bucket + self.bucket // 2
            found = self._rounds[key] = self._price(drafter, middle, rows)
        return found

    def _price(self, drafter: str, middle: int, rows: int) -> NDArray[np.float64]:
        drafted, context = np.arange(self._lengths[drafter] + 1), np.array(middle)
        return by_objective(
            lambda num_drafting: round_seconds(
                self._costs.seconds, drafter, drafted, context, rows, num_drafting
            ),
            rows,
            self._objective,
        )

    def _proposals(self, drafter: str, context: int) -> NDArray[np.float64]:
        """[K+1] of a proposal of each length."""
        key = (drafter, context // self.bucket)
        found = self._drafting.get(key)
        if found is None:
            drafted = np.arange(self._lengths[drafter] + 1)
            middle = context // self.bucket * self.bucket + self.bucket // 2
            found = np.zeros(len(drafted))
            if drafter != NONE:
                found = self._costs.seconds(drafter, PROPOSE, drafted, middle)
            self._drafting[key] = found
        return found

    def drafting(self, drafter: str, drafted: int, context: int) -> float:
        return float(self._proposals(drafter, context)[drafted])

    def catching_up(self, drafter: str, num_tokens: int) -> float:
        if drafter == NONE or num_tokens <= 0:
            return 0.0
        key = (drafter, num_tokens // 8)
        found = self._catching_up.get(key)
        if found is None:
            found = self._catching_up[key] = self._costs.seconds(drafter, START, key[1] * 8 + 4)
        return found
