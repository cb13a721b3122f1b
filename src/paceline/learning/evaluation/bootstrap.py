"""Intervals for ratios of seconds, by resampling prompts.

All strategies are resampled with the same draws, so a ratio of two of them is paired by prompt: the
difficulty of a prompt cancels. Symbols: N prompts, B resamples, D tasks, S strategies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.intervals import RESAMPLES, draw_counts, percentile_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.intervals import Interval


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
    drawn = np.concatenate([counts @ flat for counts in draw_counts(rng, N)])
    drawn = drawn.reshape(RESAMPLES, D, S + 1)
    total = flat.sum(axis=0).reshape(D, S + 1)
    return Resampled(
        tasks=tuple(map(str, names)),
        num=total[:, -1],
        sums=total[:, :-1],
        draws=drawn[:, :, -1],
        drawn=drawn[:, :, :-1],
    )


def interval(value: float, draws: np.ndarray) -> Interval:
    """Return a figure's interval. draws: [B]; NaN, for a task that a resample lacks, is left out."""
    return percentile_interval(value, draws[~np.isnan(draws)])


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, NaN where b is not above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(b > 0, a / b, np.nan))
