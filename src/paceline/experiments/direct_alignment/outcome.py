"""Figures of finished runs: the tuned rates, means over seeds, rises with intervals. Knows no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.distillation.comparison import MEAN
from paceline.errors import ConfigError
from paceline.experiments.direct_alignment.intervals import rises
from paceline.experiments.direct_alignment.plan import BASELINE, LENGTHS, Plan, Tuned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.distillation.comparison import MeasureIntervals
    from paceline.distillation.settings import LossName
    from paceline.experiments.direct_alignment.plan import Run
    from paceline.experiments.direct_alignment.results import Line, Results
    from paceline.intervals import Interval

LONGEST = LENGTHS[-1]
"""K of the block efficiency that runs are compared by."""


def tune(plan: Plan, results: Results) -> dict[LossName, float]:
    """Return the rate of each loss that is best on validation answers, with the sweep's seed.

    A rate at which a run of any seed diverged is not chosen. Raises ConfigError if there is no other.
    """
    own = plan.budget

    def score(loss: LossName, rate: float) -> float:
        lines = [results.find(plan.of_loss(loss, rate, seed)) for seed in range(own.seeds)]
        if any(line is not None and line.get("diverged") for line in lines):
            return -math.inf
        return float(results.of(plan.of_loss(loss, rate, 0))["validation"])

    rates = {loss: max(own.rates, key=lambda rate: score(loss, rate)) for loss in own.losses}
    for loss, rate in rates.items():
        if score(loss, rate) == -math.inf:
            raise ConfigError(f"the loss {loss} diverged at every rate; add smaller rates")
    return rates


def choose_best(plan: Plan, results: Results, rates: dict[LossName, float]) -> LossName:
    """Return the loss other than the baseline that is best on validation answers over all seeds."""

    def score(loss: LossName) -> float:
        seeds = range(plan.budget.seeds)
        return float(
            np.mean([results.of(plan.of_loss(loss, rates[loss], s))["validation"] for s in seeds])
        )

    return max((loss for loss in plan.budget.losses if loss != BASELINE), key=score)


@dataclass(frozen=True)
class Outcome:
    """All runs of a plan."""

    plan: Plan
    results: Results

    @cached_property
    def tuned(self) -> Tuned:
        """The tuned rates and the best loss."""
        rates = tune(self.plan, self.results)
        return Tuned(rates, choose_best(self.plan, self.results, rates))

    @cached_property
    def shared(self) -> Line:
        """The line of what all runs share."""
        found = self.results.of_kind("shared")
        assert found is not None  # the first line
        return found

    @property
    def ratio(self) -> float:
        """The student's share of the target's parameters, c."""
        return float(self.shared["parameter_ratio"])

    def of_loss(self, loss: LossName) -> list[Run]:
        """Return the runs of a loss at its rate, by seed."""
        rate = self.tuned.rates[loss]
        return [self.plan.of_loss(loss, rate, seed) for seed in range(self.plan.budget.seeds)]

    def mean(self, runs: Sequence[Run], *path: str) -> float:
        """Return the mean over runs of a figure, by its path in their lines."""
        found = []
        for run in runs:
            value: Any = self.results.of(run)
            for key in path:
                value = value[key]
            found.append(float(value))
        return float(np.mean(found))

    def tau(self, runs: Sequence[Run], task: str = MEAN, length: int = LONGEST) -> float:
        """Return the mean block efficiency over runs, of a task or of the mean over tasks."""
        where = ("mean",) if task == MEAN else ("tasks", task)
        return self.mean(runs, *where, "block_efficiency", str(length))

    def rise(
        self, before: Sequence[Run], after: Sequence[Run], length: int = LONGEST
    ) -> dict[str, MeasureIntervals]:
        """Return the rise of the measures by task, and of their mean."""
        sides = [
            [self.results.matches(self.results.of(run)) for run in side] for side in (before, after)
        ]
        return rises(sides[0], sides[1], length)


def signed(own: Interval | None, digits: int = 3) -> str:
    """Return a rise with its interval as text, a dash if there is none."""
    return "–" if own is None else own.signed(digits)
