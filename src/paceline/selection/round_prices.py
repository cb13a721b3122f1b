"""Prices of rounds while a request is decoded: the cost table, read fast.

Objectives are those of `costs.pricing`. This module knows no request and no policy.
Symbol: K, a drafter's full draft length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from paceline.config import DEFAULT_OBJECTIVE
from paceline.contracts import NONE
from paceline.costs.pricing import by_objective, draft_seconds, round_seconds, start_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from paceline.costs.pricing import Objective
    from paceline.costs.table import CostTable

_READ_STEP: Final = 8  # tokens to read that share one price


class RoundPrices(Protocol):
    """Seconds of the work that a request may do next.

    bucket: number of consecutive contexts that share one price.
    """

    @property
    def bucket(self) -> int: ...

    def rounds(self, drafter: str, context: int, rows: int) -> NDArray[np.float64]:
        """Return the seconds [K+1] of a whole round by drafted tokens; do not write to the array."""

    def drafting(self, drafter: str, drafted: int, context: int) -> float:
        """Return the seconds of a proposal alone, which is the price of a shadow draft."""

    def catching_up(self, drafter: str, num_tokens: int) -> float:
        """Return the seconds in which the drafter reads tokens that it has not seen."""


class TablePrices:
    """Prices of rounds from a cost table; each (drafter, context, rows) is interpolated once.

    A context is priced as the middle of its bucket: the price of a forward hardly changes within 64
    tokens.
    """

    bucket: Final = 64

    def __init__(
        self,
        costs: CostTable,
        lengths: Mapping[str, int],
        objective: Objective = DEFAULT_OBJECTIVE,
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
        prices = self._rounds.get(key)
        if prices is None:
            prices = self._rounds[key] = self._price_rounds(drafter, context, rows)
        return prices

    def _price_rounds(self, drafter: str, context: int, rows: int) -> NDArray[np.float64]:
        lengths, middle = np.arange(self._lengths[drafter] + 1), self._middle(context)
        return by_objective(
            lambda num_drafting: round_seconds(
                self._costs.seconds, drafter, lengths, middle, rows, num_drafting
            ),
            rows,
            self._objective,
        )

    def _middle(self, context: int) -> NDArray[np.int64]:
        return np.array(context // self.bucket * self.bucket + self.bucket // 2)

    def drafting(self, drafter: str, drafted: int, context: int) -> float:
        key = (drafter, context // self.bucket)
        prices = self._drafting.get(key)
        if prices is None:
            lengths = np.arange(self._lengths[drafter] + 1)
            prices = draft_seconds(self._costs.seconds, drafter, lengths, self._middle(context))
            self._drafting[key] = prices
        return float(prices[drafted])

    def catching_up(self, drafter: str, num_tokens: int) -> float:
        if num_tokens <= 0:
            return 0.0
        key = (drafter, num_tokens // _READ_STEP)
        price = self._catching_up.get(key)
        if price is None:
            middle = np.array(key[1] * _READ_STEP + _READ_STEP // 2)
            price = float(start_seconds(self._costs.seconds, drafter, middle))
            self._catching_up[key] = price
        return price
