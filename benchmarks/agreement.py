"""Agreement of predicted seconds with clocked ones: the size of the errors, and the order of arms.

Knows no arm and no model. A ranking counts only pairs that the prediction separates. The clock may
order closer pairs either way, and their order does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

APART: Final = 0.05  # least relative difference of the predicted seconds of a pair that counts


@dataclass(frozen=True, slots=True)
class Ranking:
    """The number of pairs that the prediction separates, and of those in the clock's order."""

    pairs: int
    right: int

    @property
    def share_right(self) -> float:
        """The share of pairs in the clock's order, 1 without pairs."""
        return self.right / self.pairs if self.pairs else 1.0

    @property
    def tau(self) -> float:
        """Kendall's tau over these pairs: 1 all in order, 0 as good as chance, -1 all reversed."""
        return 2.0 * self.share_right - 1.0

    def __add__(self, other: Ranking) -> Ranking:
        return Ranking(self.pairs + other.pairs, self.right + other.right)


def ranking(
    predicted: Mapping[str, float], clocked: Mapping[str, float], apart: float = APART
) -> Ranking:
    """Compare seconds by name. A pair for which the clock shows no difference counts as wrong."""
    pairs = right = 0
    for a, b in combinations(predicted, 2):
        fast, slow = sorted((a, b), key=predicted.__getitem__)
        if predicted[slow] >= predicted[fast] * (1.0 + apart):
            pairs += 1
            right += clocked[fast] < clocked[slow]
    return Ranking(pairs, right)


def median_error(pairs: Iterable[tuple[float, float]]) -> float:
    """Return the median of |predicted - clocked| / clocked over (predicted, clocked)."""
    return median(abs(predicted / clocked - 1.0) for predicted, clocked in pairs)


def median_bias(pairs: Iterable[tuple[float, float]]) -> float:
    """Return the median of (predicted - clocked) / clocked over (predicted, clocked)."""
    return median(predicted / clocked - 1.0 for predicted, clocked in pairs)


def bias(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the sum of the predicted over the sum of the clocked seconds, less one."""
    return sum(p for p, _ in pairs) / sum(c for _, c in pairs) - 1.0
