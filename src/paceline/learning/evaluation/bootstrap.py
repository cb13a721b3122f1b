"""Intervals for ratios of seconds, by resampling prompts.

All strategies are resampled with the same draws, so a ratio of two of them is paired by prompt: the
difficulty of a prompt cancels. Symbols: N prompts, B resamples, D tasks, S strategies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES: Final = 2000
COVERAGE: Final = 0.95
_BLOCK: Final = 250  # resamples drawn at once, to bound the memory


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95% bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} (95%: {self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Resampled:
    """Sums over the prompts of each task, in the sample and in every resample.

    A resample draws N prompts of any task, so the number of a task's prompts varies.
    """

    tasks: tuple[str, ...]  # D
    num: np.ndarray  # [D] prompts
    sums: np.ndarray  # [D, S]
    draws: np.ndarray  # [B, D] prompts in each resample
    drawn: np.ndarray  # [B, D, S]


def resample(columns: np.ndarray, tasks: Sequence[str], seed: int) -> Resampled:
    """Sum columns by task, in the sample and in resamples. columns: [N, S]; tasks: N names."""
    N, S = columns.shape
    names, of_task = np.unique(np.array(tasks, dtype=str), return_inverse=True)
    D = len(names)
    member = np.eye(D)[of_task]  # [N, D]
    # a last column of ones counts the prompts
    spread = member[:, :, None] * np.column_stack([columns, np.ones(N)])[:, None, :]  # [N, D, S+1]
    flat = spread.reshape(N, D * (S + 1))
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [
            _times(rng, N, min(_BLOCK, RESAMPLES - done)) @ flat
            for done in range(0, RESAMPLES, _BLOCK)
        ]
    ).reshape(RESAMPLES, D, S + 1)
    total = flat.sum(axis=0).reshape(D, S + 1)
    return Resampled(
        tasks=tuple(map(str, names)),
        num=total[:, -1],
        sums=total[:, :-1],
        draws=drawn[:, :, -1],
        drawn=drawn[:, :, :-1],
    )


def _times(rng: np.random.Generator, num: int, resamples: int) -> np.ndarray:
    """Return [resamples, num] how often each resample holds each prompt."""
    places = rng.integers(0, num, (resamples, num)) + num * np.arange(resamples)[:, None]
    counts = np.bincount(places.ravel(), minlength=resamples * num)
    return counts.reshape(resamples, num).astype(np.float64)


def interval(value: float, draws: np.ndarray) -> Interval:
    """Return a figure's interval. draws: [B]; NaN, for a task that a resample lacks, is left out."""
    known = draws[~np.isnan(draws)]
    tail = (1.0 - COVERAGE) / 2
    low, high = np.quantile(known, (tail, 1.0 - tail))
    return Interval(float(value), float(low), float(high))


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, NaN where b is not above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(b > 0, a / b, np.nan))
