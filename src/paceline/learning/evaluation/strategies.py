"""The ways of choosing that a policy is compared with, and what each chooses.

The best single arm, the best arm per task and the best arm per first line are fitted on the training
part, as a policy is. The oracle knows the fastest arm of each request afterwards; `ceilings` has two
more bounds. Task labels are used for the strategy that knows them and for tables only. Symbols: N
prompts, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import split_arm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RANDOM: Final = "random"
BEST_SINGLE: Final = "best single"
PER_TASK: Final = "per task"
FIRST_LINE: Final = "first line"
POLICY: Final = "policy"
ORACLE: Final = "oracle"
BASELINES: Final = (BEST_SINGLE, PER_TASK, FIRST_LINE)
"""Strategies that a policy's speed is divided by, in addition to `none`."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The result of every arm for each of N prompts, under one load.

    first_lines: of the prompts; without them there is no strategy by first line. ceilings: seconds [N]
    of bounds that choose no single arm, see `ceilings`. trained: by drafter [N] whether it was trained
    on the prompt, as in `Dataset.trained`.
    """

    arms: tuple[str, ...]  # A
    domains: tuple[str, ...]  # N
    seconds: np.ndarray  # [N, A] float64, of the whole request
    rewards: np.ndarray  # [N, A] float64
    num_tokens: np.ndarray  # [N] int64, emitted
    first_lines: tuple[str, ...] = ()  # N
    ceilings: Mapping[str, np.ndarray] = field(default_factory=dict)
    trained: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.domains)

    def rows(self, mask: np.ndarray) -> Outcomes:
        """Return the prompts where a mask [N] is true."""
        places = np.flatnonzero(mask)
        return Outcomes(
            self.arms,
            tuple(self.domains[i] for i in places),
            self.seconds[mask],
            self.rewards[mask],
            self.num_tokens[mask],
            tuple(self.first_lines[i] for i in places) if self.first_lines else (),
            {name: seconds[mask] for name, seconds in self.ceilings.items()},
            {name: known[mask] for name, known in self.trained.items()},
        )


@dataclass(frozen=True, slots=True)
class FittedStrategies:
    """The fastest arms of a training part, as places of arms."""

    best_single: int
    by_task: dict[str, int]
    by_line: dict[str, int]
    arms: tuple[int, ...]  # `none`, and every drafter at its best length

    @classmethod
    def fit(cls, train: Outcomes) -> FittedStrategies:
        """Find the arms that take the least time on the training part."""
        totals = train.seconds.sum(axis=0)  # [A]
        drafters: dict[str, list[int]] = {}
        for place, arm in enumerate(train.arms):
            drafters.setdefault(split_arm(arm)[0], []).append(place)
        return cls(
            best_single=int(totals.argmin()),
            by_task=_best_by(train.domains, train.seconds),
            by_line=_best_by(train.first_lines, train.seconds),
            arms=tuple(min(places, key=lambda p: totals[p]) for places in drafters.values()),
        )

    def distributions(
        self, data: Outcomes, policies: Mapping[str, Sequence[np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Return, by strategy, the probability of each arm for each prompt: [N, A].

        policies: by name, one [N, A] per training; their mean is returned.
        """
        N, A = data.seconds.shape
        single, best = np.eye(A), self.best_single
        found = {
            RANDOM: np.full((N, A), 1.0 / A),
            BEST_SINGLE: np.tile(single[best], (N, 1)),
            PER_TASK: single[[self.by_task.get(task, best) for task in data.domains]],
        }
        if self.by_line and data.first_lines:
            found[FIRST_LINE] = single[[self.by_line.get(line, best) for line in data.first_lines]]
        found |= {name: np.mean(trained, axis=0) for name, trained in policies.items()}
        return found | {ORACLE: single[data.seconds.argmin(axis=1)]}


def _best_by(labels: Sequence[str], seconds: np.ndarray) -> dict[str, int]:
    """Return, by label, the place of the arm that takes the least time. seconds: [N, A]."""
    if not labels:
        return {}
    names, group = np.unique(np.array(labels, dtype=str), return_inverse=True)
    totals = np.zeros((len(names), seconds.shape[1]))
    np.add.at(totals, group, seconds)
    return dict(zip(map(str, names), totals.argmin(axis=1).tolist(), strict=True))
