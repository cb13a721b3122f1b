"""What a policy would gain on prompts it never saw, beside the ways of choosing it must beat.

Predicted from replay and prices, not clocked. Task labels are used here only: for the strategy that
knows them, and for tables. The fixed strategies are fitted on the training part as the policy is.
Symbols: N prompts, A arms.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE
from paceline.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.learning.dataset import Dataset
    from paceline.selection.choosers import Chooser

RANDOM: Final = "random"
BEST_SINGLE: Final = "best single"
PER_TASK: Final = "per task"
POLICY: Final = "policy"
ORACLE: Final = "oracle"
_RESAMPLES: Final = 2000
_COVERAGE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Figures:
    """One way of choosing on a set of prompts.

    speedup: seconds of `none` for all prompts over seconds of this choice, so that long requests
    weigh what they take. mean_speedup: the mean of the prompts' own ratios. reward: its mean.
    """

    speedup: float
    mean_speedup: float
    tokens_per_second: float
    seconds: float
    reward: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All ways of choosing on one set of prompts. `arms`: that arm for every prompt.

    strategies: random (the mean over all arms), best single and per task (fitted on the training
    part), policy, oracle (the fastest arm of each request, known afterwards). chosen: the share of
    prompts that the policy gave each arm.
    """

    num_prompts: int
    arms: dict[str, Figures]
    strategies: dict[str, Figures]
    chosen: dict[str, float]


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio of speeds and its 95% bootstrap interval over prompts."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The held-out part, overall and by domain.

    policy_over: how many times as fast the policy is as `none`, as the best single arm and as the
    choice by task. fraction_of_oracle: the policy's speed over the oracle's. regret_seconds: what a
    request takes longer than with the oracle's arm, on average.
    """

    num_train: int
    best_single: str
    per_task: dict[str, str]
    overall: Comparison
    by_domain: dict[str, Comparison]
    policy_over: dict[str, Interval]
    fraction_of_oracle: float
    regret_seconds: float
    notes: tuple[str, ...] = ()

    def headline(self) -> dict[str, float]:
        """Speed-ups over `none` that matter most: policy, best single, oracle."""
        figures = self.overall.strategies
        return {name: figures[name].speedup for name in (POLICY, BEST_SINGLE, ORACLE)}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def evaluate(
    train: Dataset,
    held_out: Dataset,
    chooser: Chooser,
    choose_seconds: float = 0.0,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> EvaluationReport:
    """Compare a chooser's choices on the held-out part.

    choose_seconds: what the choice itself takes, charged to the policy. seed: of the bootstrap.
    """
    _check(train, held_out, chooser)
    arms = held_out.arms
    best_single = arms[train.seconds.sum(axis=0).argmin()]
    per_task = _best_by_domain(train)
    weights = _strategies(held_out, chooser, best_single, per_task)
    extra = {name: choose_seconds if name == POLICY else 0.0 for name in weights}
    domains = np.array(held_out.domains)
    everything = np.ones(len(held_out), dtype=bool)
    spent = {name: _seconds(held_out, w) + extra[name] for name, w in weights.items()}
    others = {NONE: held_out.seconds[:, arms.index(NONE)]}
    others |= {name: spent[name] for name in (BEST_SINGLE, PER_TASK)}
    return EvaluationReport(
        num_train=len(train),
        best_single=best_single,
        per_task=per_task,
        overall=_compare(held_out, weights, extra, everything),
        by_domain={
            str(domain): _compare(held_out, weights, extra, domains == domain)
            for domain in np.unique(domains)
        },
        policy_over={
            name: _bootstrap(seconds, spent[POLICY], seed) for name, seconds in others.items()
        },
        fraction_of_oracle=float(spent[ORACLE].sum() / spent[POLICY].sum()),
        regret_seconds=float((spent[POLICY] - spent[ORACLE]).mean()),
        notes=tuple(notes),
    )


def _check(train: Dataset, held_out: Dataset, chooser: Chooser) -> None:
    if not len(train) or not len(held_out):
        raise StoreError("nothing to evaluate: there are no prompts; collect some")
    if not train.arms == held_out.arms == chooser.arms:
        raise StoreError(
            f"the collection was priced for the arms {', '.join(held_out.arms)}, the policy is for "
            f"{', '.join(chooser.arms)}; run `paceline learn`"
        )


def _best_by_domain(train: Dataset) -> dict[str, str]:
    """The arm that takes the least time, by domain."""
    domains = np.array(train.domains)
    return {
        str(d): train.arms[train.seconds[domains == d].sum(axis=0).argmin()]
        for d in np.unique(domains)
    }


def _strategies(
    data: Dataset, chooser: Chooser, best_single: str, per_task: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """By name, the probability of each arm for each prompt: [N, A]."""
    A = len(data.arms)
    by_task = [data.arms.index(per_task.get(d, best_single)) for d in data.domains]
    choices = {
        BEST_SINGLE: np.full(len(data), data.arms.index(best_single)),
        PER_TASK: np.array(by_task),
        ORACLE: data.seconds.argmin(axis=1),
    }
    return {
        RANDOM: np.full((len(data), A), 1.0 / A),
        POLICY: chooser.law(chooser.preferences(data.features, data.situation())),
    } | {name: np.eye(A)[chosen] for name, chosen in choices.items()}


def _seconds(data: Dataset, weights: np.ndarray) -> np.ndarray:
    """[N] expected seconds of each prompt."""
    return np.asarray((weights * data.seconds).sum(axis=1))


def _compare(
    data: Dataset, weights: Mapping[str, np.ndarray], extra: Mapping[str, float], mask: np.ndarray
) -> Comparison:
    part = data.rows(mask)
    A = len(part.arms)
    single = np.eye(A)
    share = weights[POLICY][mask].mean(axis=0)
    return Comparison(
        num_prompts=len(part),
        arms={
            arm: _figures(part, np.tile(single[i], (len(part), 1)), 0.0)
            for i, arm in enumerate(part.arms)
        },
        strategies={name: _figures(part, w[mask], extra[name]) for name, w in weights.items()},
        chosen={arm: float(share[i]) for i, arm in enumerate(part.arms)},
    )


def _figures(part: Dataset, weights: np.ndarray, extra: float) -> Figures:
    none = part.seconds[:, part.arms.index(NONE)]  # [N]
    seconds = part.seconds + extra  # [N, A]
    total = float((weights * seconds).sum())
    return Figures(
        speedup=float(none.sum()) / total,
        mean_speedup=float((weights * (none[:, None] / seconds)).sum(axis=1).mean()),
        tokens_per_second=float(part.num_tokens.sum()) / total,
        seconds=total,
        reward=float((weights * part.rewards).sum(axis=1).mean()),
    )


def _bootstrap(reference: np.ndarray, policy: np.ndarray, seed: int) -> Interval:
    """The ratio of total seconds, resampling prompts. reference, policy: [N] seconds."""
    rng = np.random.default_rng(seed)
    ratios = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        places = rng.integers(0, len(policy), len(policy))
        ratios[i] = reference[places].sum() / policy[places].sum()
    tail = (1.0 - _COVERAGE) / 2
    low, high = np.quantile(ratios, (tail, 1.0 - tail))
    return Interval(float(reference.sum() / policy.sum()), float(low), float(high))
