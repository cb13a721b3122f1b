"""The gain of policies on prompts they never saw, next to that of other strategies.

All figures are predicted from replay and prices, not clocked. Symbols: N prompts, A arms, S strategies,
D tasks, B resamples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE
from paceline.errors import StoreError
from paceline.learning.evaluation.ceilings import SPLIT_HALF
from paceline.learning.evaluation.exposure import count_seen, seen_by_training
from paceline.learning.evaluation.figures import (
    Comparison,
    SlowestTask,
    Tally,
    compare,
    find_slowest,
    ratio,
    tally_by_task,
)
from paceline.learning.evaluation.strategies import (
    BASELINES,
    BEST_SINGLE,
    ORACLE,
    POLICY,
    FittedStrategies,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.intervals import Interval
    from paceline.learning.evaluation.exposure import Exposure
    from paceline.learning.evaluation.strategies import Outcomes

SLOWEST: Final = 0.98
"""No task may be slower than this share of the speed of `none`."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Figures on prompts that no policy and no drafter was trained on, overall and by task.

    seen: all strategies on the other prompts, which some drafter was trained on; None if there are
    none. exposure: the numbers of both. over: by policy, its speed over that of `none`, of each of
    `BASELINES` and of the split-half ceiling. slowest: by strategy.
    by_seed: speed-up of each training of a policy; its figures are means over them. known_first_lines:
    the share of prompts whose first line occurs in training.
    """

    num_train: int
    best_single: str
    per_task: dict[str, str]
    policies: tuple[str, ...]
    overall: Comparison
    by_domain: dict[str, Comparison]
    over: dict[str, dict[str, Interval]]
    slowest: dict[str, SlowestTask]
    by_seed: dict[str, tuple[float, ...]]
    known_first_lines: float | None
    exposure: Exposure
    seen: Comparison | None = None
    notes: tuple[str, ...] = ()

    @property
    def fraction_of_oracle(self) -> float:
        """Return the first policy's speed over the oracle's."""
        return self.overall.strategies[self.policies[0]].of_oracle

    def headline(self) -> dict[str, float]:
        """Return the most important speed-ups over `none`: policy, best single, oracle."""
        figures = self.overall.strategies
        names = {POLICY: self.policies[0], BEST_SINGLE: BEST_SINGLE, ORACLE: ORACLE}
        return {shown: figures[name].speedup.value for shown, name in names.items()}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def evaluate(
    train: Outcomes,
    held_out: Outcomes,
    policies: Mapping[str, Sequence[np.ndarray]],
    *,
    choose_seconds: Mapping[str, float] | None = None,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> EvaluationReport:
    """Compare policies on the held-out part.

    policies: by name, one [N, A] per training, the probabilities of each arm for the held-out prompts.
    choose_seconds: seconds of one choice, by policy, charged to it. seed: of the bootstrap. Raises
    StoreError if the parts have different arms or shapes, or no prompts, or if drafters were trained on
    nearly all held-out prompts.
    """
    _check(train, held_out, policies)
    fitted, charges = FittedStrategies.fit(train), choose_seconds or {}
    seen, exposure = seen_by_training(held_out.trained, len(held_out))

    def tally_of(mask: np.ndarray) -> tuple[Outcomes, dict[str, list[np.ndarray]], Tally]:
        own = {name: [one[mask] for one in trained] for name, trained in policies.items()}
        part = held_out.rows(mask)
        distributions = fitted.distributions(part, own)
        extra = {name: charges.get(name, 0.0) for name in distributions}
        return part, own, tally_by_task(part, fitted, distributions, extra, seed)

    of_seen = compare(tally_of(seen)[2], slice(None)) if seen.any() else None
    held_out, policies, tally = tally_of(~seen)
    baselines: dict[str, int] = {NONE: tally.arms[NONE]}
    baselines |= {
        name: tally.strategies[name]
        for name in (*BASELINES, SPLIT_HALF)
        if name in tally.strategies
    }
    known = [line in fitted.by_line for line in held_out.first_lines]
    return EvaluationReport(
        num_train=len(train),
        best_single=train.arms[fitted.best_single],
        per_task={task: train.arms[place] for task, place in fitted.by_task.items()},
        policies=tuple(policies),
        overall=compare(tally, slice(None)),
        by_domain={
            task: compare(tally, slice(i, i + 1)) for i, task in enumerate(tally.sampled.tasks)
        },
        over={
            name: {
                baseline: ratio(tally, place, tally.strategies[name])
                for baseline, place in baselines.items()
            }
            for name in policies
        },
        slowest={name: find_slowest(tally, place) for name, place in tally.strategies.items()},
        by_seed={
            name: tuple(_speedup(held_out, one, charges.get(name, 0.0)) for one in trained)
            for name, trained in policies.items()
        },
        known_first_lines=float(np.mean(known)) if known else None,
        exposure=replace(exposure, seen_by_policies=count_seen(train.trained)),
        seen=of_seen,
        notes=tuple(notes),
    )


def _speedup(data: Outcomes, distribution: np.ndarray, choose_seconds: float) -> float:
    none = data.seconds[:, data.arms.index(NONE)].sum()
    return float(none / ((distribution * data.seconds).sum() + choose_seconds * len(data)))


def _check(
    train: Outcomes, held_out: Outcomes, policies: Mapping[str, Sequence[np.ndarray]]
) -> None:
    if not len(train) or not len(held_out):
        raise StoreError("nothing to evaluate: there are no prompts; collect some")
    if train.arms != held_out.arms:
        raise StoreError(
            f"the prompts to evaluate on have the arms {', '.join(held_out.arms)}, those to learn "
            f"from {', '.join(train.arms)}; run `paceline collect PROMPTS` with the same drafters"
        )
    shape = (len(held_out), len(held_out.arms))
    for name, distributions in policies.items():
        for distribution in distributions:
            if distribution.shape != shape:
                raise StoreError(
                    f"'{name}' chose for {distribution.shape[0]} prompts among "
                    f"{distribution.shape[1]} arms, there "
                    f"are {shape[0]} and {shape[1]}; run `paceline learn`"
                )
