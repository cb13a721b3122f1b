"""Figures with a 95% interval, and the draws of a bootstrap. Knows no measure.

Symbols: N resampled items, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

COVERAGE: Final = 0.95
RESAMPLES: Final = 2000  # B
_BLOCK: Final = 250  # resamples drawn at once, to bound the memory


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95% interval, which is infinite where the spread is unknown."""

    value: float
    low: float
    high: float

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval is above 0: of a difference, a rise with confidence."""
        return self.low > 0.0

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0: of a difference, a rise or a fall with confidence."""
        return self.low > 0.0 or self.high < 0.0

    def __str__(self) -> str:
        return f"{self.value:.3f} (95%: {self.low:.3f} to {self.high:.3f})"

    def signed(self, digits: int = 3) -> str:
        """Return a difference as text, such as `+0.012 (-0.003 to +0.027)`."""
        return f"{self.value:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"


def percentile_interval(value: float, draws: NDArray[Any]) -> Interval:
    """Return a figure's interval between percentiles of its resamples. draws: [B] numbers."""
    tail = (1.0 - COVERAGE) / 2
    low, high = np.quantile(draws, (tail, 1.0 - tail))
    return Interval(float(value), float(low), float(high))


def draw_counts(random: np.random.Generator, num: int) -> Iterator[NDArray[np.float64]]:
    """Yield blocks [b, N] of B resamples in total: how often each resample has each of N items."""
    for done in range(0, RESAMPLES, _BLOCK):
        size = min(_BLOCK, RESAMPLES - done)
        places = random.integers(0, num, (size, num)) + num * np.arange(size)[:, None]
        counts = np.bincount(places.ravel(), minlength=size * num)
        yield counts.reshape(size, num).astype(np.float64)
