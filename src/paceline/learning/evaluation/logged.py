"""What policies would have gained on requests that were served, from a log of explored choices.

Each request tried one arm, so the other arms are known from requests like it that tried them; see
`learning.off_policy`. By the clock, unlike a replay: the reward is the logarithm of tokens per
second, so a gain is a ratio of speeds and an arm's gain counts the same on slow and fast requests.
Symbols: n requests, A arms, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.errors import StoreError
from paceline.learning.evaluation.bootstrap import COVERAGE, Interval
from paceline.learning.off_policy import (
    LoggedChoices,
    cross_fitted_rewards,
    doubly_robust,
    ips,
    snips,
)
from paceline.selection.choosers import Situation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.costs import Objective
    from paceline.learning.off_policy import Estimate
    from paceline.selection.choosers import Chooser

FEW: Final = 30  # effective requests below which an interval is not to be trusted


@dataclass(frozen=True, slots=True)
class Served:
    """Requests as they were served. Raises StoreError where a speed is not above 0."""

    arms: tuple[str, ...]  # A
    chosen: np.ndarray  # [n] places of arms
    propensities: np.ndarray  # [n] of the chosen arm when it was chosen
    tokens_per_second: np.ndarray  # [n] by the clock, prefill included
    features: np.ndarray  # [n, F]
    num_prompt: np.ndarray  # [n] tokens
    rows: np.ndarray  # [n] in flight when it was chosen

    def __post_init__(self) -> None:
        if not (np.isfinite(self.tokens_per_second) & (self.tokens_per_second > 0)).all():
            raise StoreError("a served request has no tokens per second; leave it out of the log")

    def __len__(self) -> int:
        return len(self.chosen)

    def choices(self) -> LoggedChoices:
        """With rewards measured from their mean, so that a policy's value is its gain."""
        rewards = np.log(self.tokens_per_second)
        return LoggedChoices(
            self.chosen, self.propensities, rewards - rewards.mean(), len(self.arms)
        )

    def distributions(self, chooser: Chooser, objective: Objective = "latency") -> np.ndarray:
        """[n, A] with which a chooser takes each arm, told what was known when it was served."""
        if chooser.arms != self.arms:
            raise StoreError(
                f"the log has the arms {', '.join(self.arms)}, the policy is for "
                f"{', '.join(chooser.arms)}; run `paceline learn`"
            )
        distributions = np.empty((len(self), len(self.arms)))
        for rows in np.unique(self.rows):
            own = self.rows == rows
            situation = Situation(self.num_prompt[own], int(rows), objective)
            distributions[own] = chooser.distribution(
                chooser.preferences(self.features[own], situation)
            )
        return distributions


@dataclass(frozen=True, slots=True)
class LoggedGain:
    """How many times as fast as what was served, by one estimator.

    effective: how many requests of the policy's own would say as much.
    """

    speed: Interval
    effective: float


@dataclass(frozen=True, slots=True)
class LoggedReport:
    """By policy, its gain over what was served, by `ips`, `snips` and `doubly robust`."""

    num_requests: int
    gains: dict[str, dict[str, LoggedGain]]

    def sentences(self) -> list[str]:
        """The doubly robust estimate in words, and a warning where the log says little."""
        said = []
        for policy, by_estimator in self.gains.items():
            gain = by_estimator["doubly robust"]
            known = f"{policy} is {gain.speed} times as fast as what was served"
            if gain.effective < FEW:
                known += (
                    f", but the log says no more of it than {gain.effective:.0f} requests of its "
                    "own would; log more with explore > 0"
                )
            said.append(known)
        return said


def evaluate_logged(
    served: Served, policies: Mapping[str, np.ndarray], seed: int = 0
) -> LoggedReport:
    """policies: by name [n, A], see `Served.distributions`. seed: of the folds of the reward model.

    None of the requests may have been trained on. Raises StoreError where what a policy would do was
    never tried, which takes a log with explore > 0.
    """
    choices = served.choices()
    predicted = cross_fitted_rewards(choices, served.features, seed=seed)
    return LoggedReport(
        len(served),
        {
            name: {
                "ips": _gain(ips(choices, distribution)),
                "snips": _gain(snips(choices, distribution)),
                "doubly robust": _gain(doubly_robust(choices, distribution, predicted)),
            }
            for name, distribution in policies.items()
        },
    )


def _gain(estimate: Estimate) -> LoggedGain:
    low, high = estimate.interval(COVERAGE)
    speed = Interval(*(float(np.exp(value)) for value in (estimate.value, low, high)))
    return LoggedGain(speed, estimate.effective_sample_size)
