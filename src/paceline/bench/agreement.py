"""How well predicted seconds agree with clocked ones: how large the errors are, who is faster.

Knows no arm and no model. A ranking looks at pairs that the prediction tells apart; pairs nearer to
each other than that may come out either way by the clock, and nothing hangs on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

APART: Final = 0.05  # how much slower the slower of a pair is predicted to be, at least


@dataclass(frozen=True, slots=True)
class Ranking:
    """Pairs predicted to differ, and how many of them the clock puts in the same order."""

    pairs: int
    right: int

    @property
    def share_right(self) -> float:
        """1 where there was nothing to tell apart."""
        return self.right / self.pairs if self.pairs else 1.0

    @property
    def tau(self) -> float:
        """Kendall's tau over these pairs: 1 all in order, 0 as good as tossing, -1 all reversed."""
        return 2.0 * self.share_right - 1.0

    def __add__(self, other: Ranking) -> Ranking:
        return Ranking(self.pairs + other.pairs, self.right + other.right)


def ranking(
    predicted: Mapping[str, float], clocked: Mapping[str, float], apart: float = APART
) -> Ranking:
    """Compare seconds by name. Where the clock shows no difference, the order counts as wrong."""
    pairs = right = 0
    for a, b in combinations(predicted, 2):
        fast, slow = sorted((a, b), key=predicted.__getitem__)
        if predicted[slow] >= predicted[fast] * (1.0 + apart):
            pairs += 1
            right += clocked[fast] < clocked[slow]
    return Ranking(pairs, right)


def median_error(pairs: Iterable[tuple[float, float]]) -> float:
    """Median of |predicted - clocked| / clocked over (predicted, clocked)."""
    return median(abs(predicted / clocked - 1.0) for predicted, clocked in pairs)


def bias(pairs: Sequence[tuple[float, float]]) -> float:
    """Sum of the predicted over that of the clocked, less one: which way the errors lie."""
    return sum(p for p, _ in pairs) / sum(c for _, c in pairs) - 1.0
