"""Measures of a drafter along the target's own answers: acceptance, block efficiency, speed-up.

The loss of a training is a proxy; these are what drafting gains by. Rounds are counted as `replay.walk`
counts them: the prefill emits an answer's first token, and a round at position i accepts the run of
matches from i, at most K of them, and emits one token more unless the answer has ended. Tasks have
equal weight in a mean, whatever their number of tokens. MBSU is that of arXiv 2403.00858.
Knows no model and no clock. Symbols: K the longest draft, n positions of all answers, N answers, D
tasks, tau the block efficiency, c the drafter's share of the target's parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.compiled import compiled
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

LONGEST: Final = 16
"""K, unless a caller names another."""


@dataclass(frozen=True, slots=True, eq=False)
class AnswerMatches:
    """The positions of N answers at which a drafter is right, one answer after the other.

    match: the drafter's most likely token is the answer's. overlap: the sum of min(p, q), which is the
    probability of acceptance under sampling, or None if it was not computed.
    """

    match: NDArray[np.bool_]  # [n]
    starts: NDArray[np.int64]  # [N + 1] the first position of each answer, and n
    tasks: tuple[str, ...]  # N
    overlap: NDArray[np.floating[Any]] | None = None  # [n]

    @classmethod
    def of(
        cls,
        matches: Sequence[NDArray[np.bool_]],
        tasks: Sequence[str],
        overlaps: Sequence[NDArray[np.floating[Any]]] | None = None,
    ) -> AnswerMatches:
        """Join the positions of answers. matches: N arrays of the answers' lengths.

        Raises ValueError if the numbers of answers, tasks or positions differ.
        """
        lengths = [len(own) for own in matches]
        if len(tasks) != len(lengths):
            raise ValueError(f"{len(lengths)} answers have {len(tasks)} tasks")
        if overlaps is not None and [len(own) for own in overlaps] != lengths:
            raise ValueError("overlaps and matches are of different positions")
        nothing = np.zeros(0)
        return cls(
            np.concatenate([nothing.astype(bool), *matches]).astype(bool),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            tuple(tasks),
            None if overlaps is None else np.concatenate([nothing, *overlaps]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class TaskMeasures:
    """The measures of a drafter on one task, or their mean over tasks.

    match_rate: greedy acceptance per position. acceptance: under sampling, NaN if unknown. The arrays
    have a value for every K from 0, which is plain decoding. speedups: predicted, over plain decoding.
    """

    num_answers: int
    num_tokens: int
    match_rate: float
    acceptance: float
    block_efficiency: NDArray[np.float64]  # [K + 1] tau
    mbsu: NDArray[np.float64]  # [K + 1]
    speedups: NDArray[np.float64]  # [K + 1]

    @property
    def best_length(self) -> int:
        """The draft length with the largest predicted speed-up, at least 1."""
        return 1 + int(self.speedups[1:].argmax())

    @property
    def predicted_speedup(self) -> float:
        """The predicted speed-up at the best draft length; below 1 where drafting does not pay."""
        return float(self.speedups[self.best_length])

    def to_history(self) -> dict[str, Any]:
        """Return plain values for a run's history; block efficiency and MBSU are by K as text."""
        return {
            "match_rate": round(self.match_rate, 5),
            "acceptance": None if math.isnan(self.acceptance) else round(self.acceptance, 5),
            "block_efficiency": _by_length(self.block_efficiency),
            "mbsu": _by_length(self.mbsu),
            "num_draft_tokens": self.best_length,
            "predicted_speedup": round(self.predicted_speedup, 5),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """The measures of a drafter by task, and their mean in which tasks have equal weight.

    is_priced: the speed-ups follow from measured seconds; otherwise from the parameters' ratio c.
    """

    mean: TaskMeasures
    tasks: Mapping[str, TaskMeasures]
    is_priced: bool

    def to_history(self) -> dict[str, Any]:
        """Return plain values for a run's history: the mean's, and `domains` with each task's."""
        domains = {task: own.to_history() for task, own in self.tasks.items()}
        return {**self.mean.to_history(), "is_priced": self.is_priced, "domains": domains}


def measure(
    answers: AnswerMatches,
    parameter_ratio: float,
    round_costs: NDArray[np.float64] | None = None,
    longest: int = LONGEST,
) -> Measures:
    """Return a drafter's measures.

    parameter_ratio: c. round_costs: [K + 1], the seconds of a round with k drafted tokens in units of a
    plain round (`Prices.round_costs`); they decide K. Without them speed-ups are MBSU, which assumes
    that a forward costs by the parameters that it reads, and K is `longest`; `Measures.is_priced` says
    so. A task whose answers have one token has no round, block efficiency 1 and speed-up 1, as in the
    engine; one without any token is left out. Raises ConfigError if no answer has a token.
    """
    if round_costs is not None:
        longest = len(round_costs) - 1
    memory_bound = memory_bound_costs(parameter_ratio, longest)
    costs = memory_bound if round_costs is None else round_costs
    counts = tally(answers, len(costs) - 1)
    tasks = {}
    for task in sorted(set(answers.tasks)):
        own = np.array([name == task for name in answers.tasks])
        rounds, positions = counts.rounds[own].sum(axis=0), counts.positions[own].sum()
        if not positions:
            continue
        drafts = rounds[0] > 0
        tau = counts.emitted[own].sum() / rounds if drafts else np.ones(len(costs))
        tasks[task] = TaskMeasures(
            num_answers=int(own.sum()),
            num_tokens=int(positions),
            match_rate=float(counts.matches[own].sum() / positions),
            acceptance=float(counts.overlap[own].sum() / positions),
            block_efficiency=tau,
            mbsu=tau / memory_bound if drafts else tau,
            speedups=tau / costs if drafts else tau,
        )
    if not tasks:
        raise ConfigError("no answer to measure on; give more validation prompts")
    return Measures(_mean(list(tasks.values())), tasks, round_costs is not None)


def memory_bound_costs(parameter_ratio: float, longest: int = LONGEST) -> NDArray[np.float64]:
    """Return 1 + c K for every K [K + 1]: a round's cost if forwards cost by their parameters."""
    costs: NDArray[np.float64] = 1.0 + parameter_ratio * np.arange(longest + 1.0)
    return costs


# --- counting -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Tallies:
    """The counts of each of N answers."""

    positions: NDArray[np.int64]  # [N]
    matches: NDArray[np.float64]  # [N]
    overlap: NDArray[np.float64]  # [N] NaN if unknown
    emitted: NDArray[np.int64]  # [N] tokens that rounds emit
    rounds: NDArray[np.int64]  # [N, K + 1] by draft length


def tally(answers: AnswerMatches, longest: int = LONGEST) -> Tallies:
    """Count each answer's matches, and its rounds at every draft length up to `longest`."""
    positions, overlap = np.diff(answers.starts), answers.overlap
    return Tallies(
        positions=positions,
        matches=_sum_by_answer(answers.match, answers.starts),
        overlap=np.full(len(positions), math.nan)
        if overlap is None
        else _sum_by_answer(overlap, answers.starts),
        # the prefill emits the first token
        emitted=np.maximum(positions - 1, 0),
        rounds=count_rounds(answers.match, answers.starts, longest),
    )


def _sum_by_answer(values: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    before = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return np.diff(before[starts])


@compiled
def count_rounds(
    match: NDArray[np.bool_], starts: NDArray[np.int64], longest: int
) -> NDArray[np.int64]:
    """Return the rounds of each answer at each draft length [N, K + 1]."""
    rounds = np.zeros((len(starts) - 1, longest + 1), dtype=np.int64)
    for i in range(len(starts) - 1):
        first, end = starts[i], starts[i + 1]
        # run[j]: successive matches from place j of the answer on
        run = np.zeros(end - first + 1, dtype=np.int64)
        for j in range(end - first - 1, -1, -1):
            run[j] = run[j + 1] + 1 if match[first + j] else 0
        for length in range(longest + 1):
            place = 1
            while place < end - first:
                rounds[i, length] += 1
                place += min(run[place], length) + 1
    return rounds


def _mean(tasks: Sequence[TaskMeasures]) -> TaskMeasures:
    def over_tasks(name: str) -> Any:
        return np.mean([getattr(own, name) for own in tasks], axis=0)

    return TaskMeasures(
        num_answers=sum(own.num_answers for own in tasks),
        num_tokens=sum(own.num_tokens for own in tasks),
        match_rate=float(over_tasks("match_rate")),
        acceptance=float(over_tasks("acceptance")),
        block_efficiency=over_tasks("block_efficiency"),
        mbsu=over_tasks("mbsu"),
        speedups=over_tasks("speedups"),
    )


def _by_length(values: NDArray[np.float64]) -> dict[str, float]:
    """Return the values at K = 1 and more, by K as text."""
    return {str(k): round(float(value), 5) for k, value in enumerate(values) if k}
