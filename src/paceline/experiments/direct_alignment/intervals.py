"""The rise of a drafter's measures from one kind of training to another, over seeds and answers.

Runs are paired by seed and judged on the same answers. Two variances add up: that over the answers of
a task, by linearising the ratios of sums, and that between the seeds. The interval is Student's with
the degrees of freedom of Welch and Satterthwaite, since a few seeds say little about their variance.
With one seed it is close to that of `distillation.comparison.compare`, without random draws.
Symbols: S seeds, N answers of a task.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from paceline.distillation.comparison import MEAN, MeasureIntervals, count_columns
from paceline.errors import ConfigError
from paceline.intervals import COVERAGE, Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from paceline.distillation.measures import AnswerMatches

    Floats = NDArray[np.float64]

# columns of the numerator and the denominator: match rate, acceptance, block efficiency
_RATIOS: Final = ((1, 0), (2, 0), (3, 4))


class _Rises(NamedTuple):
    """The rises of one task in three figures."""

    by_seed: Floats  # [S, 3]
    variance: Floats  # [3] of their mean, over answers
    num: int  # N


def rises(
    before: Sequence[AnswerMatches], after: Sequence[AnswerMatches], num_draft_tokens: int
) -> dict[str, MeasureIntervals]:
    """Return the rise by task, and its mean over tasks under `MEAN`.

    before, after: a run per seed, in the same order of seeds. num_draft_tokens: K of the block
    efficiency. Raises ConfigError if their numbers or their answers differ.
    """
    first = before[0]
    if len(before) != len(after) or any(own.tasks != first.tasks for own in (*before, *after)):
        raise ConfigError("drafters are compared with as many seeds and on the same answers")
    tasks = np.array(first.tasks)
    columns = [[count_columns(x, num_draft_tokens) for x in side] for side in (before, after)]
    has_tokens = columns[0][0][:, 0] > 0
    found = {}
    for task in map(str, np.unique(tasks[has_tokens])):
        own = (tasks == task) & has_tokens
        found[task] = _rise(*([x[own] for x in side] for side in columns))
    intervals = {task: _intervals([one]) for task, one in found.items()}
    return {**intervals, MEAN: _intervals(list(found.values()))}


def _rise(before: Sequence[Floats], after: Sequence[Floats]) -> _Rises:
    """Return the rises of one task. before, after: [N, 5] per seed."""
    figures = [_linearised(x) for x in (*before, *after)]
    S, N = len(before), len(before[0])
    values = np.array([value for value, _ in figures])  # [2 S, 3]
    influences = np.array([influence for _, influence in figures])  # [2 S, N, 3]
    of_answers = (influences[S:] - influences[:S]).mean(axis=0)  # [N, 3]
    spread = N / (N - 1) if N > 1 else math.inf
    with np.errstate(invalid="ignore"):
        variance = spread * (of_answers**2).sum(axis=0)
    return _Rises(values[S:] - values[:S], np.nan_to_num(variance, nan=math.inf), N)


def _linearised(columns: Floats) -> tuple[Floats, Floats]:
    """Return the figures [3] and the influence of each answer on them [N, 3]."""
    values, influences = [], []
    for above, below in _RATIOS:
        total = columns[:, below].sum()
        # where no round starts, the block efficiency is 1, as in the engine
        value = columns[:, above].sum() / total if total else 1.0
        values.append(value)
        influences.append((columns[:, above] - value * columns[:, below]) / max(total, 1.0))
    return np.array(values), np.stack(influences, axis=-1)


def _intervals(tasks: Sequence[_Rises]) -> MeasureIntervals:
    """Return the intervals of the mean over tasks."""
    by_seed = np.mean([task.by_seed for task in tasks], axis=0)  # [S, 3]
    S, T = len(by_seed), len(tasks)
    parts = [(task.variance / T**2, task.num - 1) for task in tasks]
    if S > 1:
        parts.append((by_seed.var(axis=0, ddof=1) / S, S - 1))
    variances = np.array([variance for variance, _ in parts])  # [parts, 3]
    freedoms = np.array([freedom for _, freedom in parts], dtype=np.float64)[:, None]
    match_rate, acceptance, block_efficiency = (
        _interval(float(by_seed[:, i].mean()), variances[:, i], freedoms[:, 0]) for i in range(3)
    )
    return MeasureIntervals(match_rate, acceptance, block_efficiency)


def _interval(value: float, variances: Floats, freedoms: Floats) -> Interval:
    total = float(variances.sum())
    if total == 0.0:
        return Interval(value, value, value)
    if not math.isfinite(total):
        return Interval(value, -math.inf, math.inf)
    freedom = total**2 / float((variances**2 / freedoms).sum())
    half = float(student_t.ppf((1 + COVERAGE) / 2, freedom)) * math.sqrt(total)
    return Interval(value, value - half, value + half)
