"""Intervals of a drafter's measures over answers, and of the difference between two drafters.

A bootstrap resamples the answers of each task. Two drafters are read on the same draws, so the
difficulty of an answer cancels. Tasks have equal weight in the mean. Knows no model.
Symbols: B resamples, N answers of a task, K draft length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.distillation.measures import tally
from paceline.errors import ConfigError
from paceline.intervals import Interval, draw_counts, percentile_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from paceline.distillation.measures import AnswerMatches

MEAN: Final = "mean"
"""The entry of the mean over tasks."""


@dataclass(frozen=True, slots=True)
class MeasureIntervals:
    """Intervals of a drafter's measures, or of the rise from one drafter to another.

    acceptance: under sampling, None if it is unknown.
    """

    match_rate: Interval
    acceptance: Interval | None
    block_efficiency: Interval


def measure_intervals(
    answers: AnswerMatches, num_draft_tokens: int, seed: int = 0
) -> dict[str, MeasureIntervals]:
    """Return the intervals of a drafter's measures by task, and of their mean under `MEAN`.

    num_draft_tokens: K of the block efficiency. Raises ConfigError as `compare` does.
    """
    return _intervals([answers], num_draft_tokens, seed)


def compare(
    before: AnswerMatches, after: AnswerMatches, num_draft_tokens: int, seed: int = 0
) -> dict[str, MeasureIntervals]:
    """Return the rise from `before` to `after` by task, and its mean over tasks under `MEAN`.

    Both are of the same answers in the same order. num_draft_tokens: K of the block efficiency. Raises
    ConfigError if the answers differ, or if none has a token.
    """
    if before.tasks != after.tasks or not np.array_equal(before.starts, after.starts):
        raise ConfigError(
            "drafters are compared on the same answers, tasks and order; one has "
            f"{len(before.tasks)} answers of {len(before.match)} tokens, the other "
            f"{len(after.tasks)} of {len(after.match)}"
        )
    return _intervals([before, after], num_draft_tokens, seed)


def _intervals(
    drafters: Sequence[AnswerMatches], num_draft_tokens: int, seed: int
) -> dict[str, MeasureIntervals]:
    columns = [count_columns(own, num_draft_tokens) for own in drafters]
    has_tokens = columns[0][:, 0] > 0
    if not has_tokens.any():
        raise ConfigError("no answer to compare on; give more validation prompts")
    tasks = np.array(drafters[0].tasks, dtype=str)
    random = np.random.default_rng(seed)
    figures: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for task in map(str, np.unique(tasks[has_tokens])):
        own = (tasks == task) & has_tokens
        figures[task] = _resample([part[own] for part in columns], random)
    values = np.mean([value for value, _ in figures.values()], axis=0)
    draws = np.mean([drawn for _, drawn in figures.values()], axis=0)
    return {
        name: _to_intervals(value, drawn)
        for name, (value, drawn) in {**figures, MEAN: (values, draws)}.items()
    }


def count_columns(answers: AnswerMatches, num_draft_tokens: int) -> NDArray[np.float64]:
    """Return the counts that figures are ratios of, [N, 5].

    They are an answer's positions, matches, sum of overlaps, tokens that rounds emit, and rounds.
    """
    counts = tally(answers, num_draft_tokens)
    found = (counts.positions, counts.matches, counts.overlap, counts.emitted)
    return np.column_stack([*found, counts.rounds[:, num_draft_tokens]]).astype(np.float64)


def _resample(
    columns: Sequence[NDArray[np.float64]], random: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return three figures [3] and their resamples [B, 3]: of one drafter, or the second's rise.

    columns: [N, 5] of each drafter.
    """
    num = len(columns[0])
    parts = [
        _difference([_figures(counts @ own) for own in columns])
        for counts in draw_counts(random, num)
    ]
    value = _difference([_figures(own.sum(axis=0)) for own in columns])
    # a resample of N answers varies less than N new ones, by N - 1 over N
    spread = math.sqrt(num / (num - 1)) if num > 1 else math.nan
    return value, value + spread * (np.concatenate(parts) - value)


def _figures(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return match rate, acceptance and block efficiency [..., 3] of sums [..., 5]."""
    positions, matches, overlap, emitted, rounds = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # where no round starts, tau is 1, as in the engine
        tau = np.where(rounds > 0, emitted / rounds, 1.0)
        return np.stack([matches / positions, overlap / positions, tau], axis=-1)


def _difference(figures: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return figures[0] if len(figures) == 1 else figures[1] - figures[0]


def _to_intervals(value: NDArray[np.float64], draws: NDArray[np.float64]) -> MeasureIntervals:
    match_rate, acceptance, block_efficiency = (
        _interval(float(own), draws[:, place]) for place, own in enumerate(value)
    )
    known = None if math.isnan(acceptance.value) else acceptance
    return MeasureIntervals(match_rate, known, block_efficiency)


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    """Return a figure's interval, infinite if a resample has no figure, as of a single answer."""
    if np.isnan(draws).any():
        return Interval(value, -math.inf, math.inf)
    return percentile_interval(value, draws)
