"""The gain of policies on prompts they never saw, next to that of other strategies.

All figures are predicted from replay and prices, not clocked. Symbols: N prompts, A arms, S strategies,
D tasks, B resamples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE, split_arm
from paceline.errors import StoreError
from paceline.learning.evaluation.bootstrap import Interval, Resampled, divide, interval, resample
from paceline.learning.evaluation.strategies import (
    BASELINES,
    BEST_SINGLE,
    ORACLE,
    POLICY,
    FittedStrategies,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.learning.evaluation.strategies import Outcomes

NEAR: Final = 1.02
"""An arm is nearly as good as the fastest if it takes at most this many times its seconds."""

SLOWEST: Final = 0.98
"""No task may be slower than this share of the speed of `none`."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one strategy on a set of prompts.

    speedup: seconds of `none` for all prompts over seconds of this strategy, so that requests weigh in
    proportion to their time. mean_speedup: the mean of the prompts' own ratios. reward: its mean.
    regret_seconds: mean extra seconds of a request compared with its fastest arm; regret: the same as
    a share of the oracle's seconds. accuracy: share of prompts that get the fastest arm; near: share
    that get an arm that takes at most 2% longer.
    """

    speedup: Interval
    mean_speedup: float
    tokens_per_second: float
    seconds: float
    reward: float
    regret_seconds: Interval
    regret: Interval
    accuracy: float
    near: float

    @property
    def of_oracle(self) -> float:
        """Return its speed over the oracle's."""
        return 1.0 / (1.0 + self.regret.value)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Shares of the prompts by their arm, drafter and draft length."""

    arms: dict[str, float]
    drafters: dict[str, float]
    lengths: dict[str, float]  # "own" for a drafter's configured length, "-" for none


@dataclass(frozen=True, slots=True)
class Comparison:
    """All strategies on one set of prompts.

    arms: `none` and each drafter at its best length in training, for every prompt. strategies: random
    (the mean over all arms), best single, per task and first line (fitted on the training part), the
    policies, oracle (the fastest arm of each request, known afterwards). chosen: by strategy.
    """

    num_prompts: int
    arms: dict[str, Figures]
    strategies: dict[str, Figures]
    chosen: dict[str, Chosen]


@dataclass(frozen=True, slots=True)
class SlowestTask:
    """The task on which a strategy gains least over `none`.

    The interval is of the smallest ratio in each resample, whichever its task, so it lies lower than
    the task's own interval. A promise about all tasks must hold for this one.
    """

    task: str
    speedup: Interval


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Figures on prompts that no policy was trained on, overall and by task.

    over: by policy, its speed over that of `none` and of each of `BASELINES`. slowest: by strategy.
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
    StoreError if the parts have different arms or shapes, or no prompts.
    """
    _check(train, held_out, policies)
    fitted = FittedStrategies.fit(train)
    distributions = fitted.distributions(held_out, policies)
    charges = choose_seconds or {}
    extra = {name: charges.get(name, 0.0) for name in distributions}
    tally = _tally(held_out, fitted, distributions, extra, seed)
    baselines: dict[str, int] = {NONE: tally.arms[NONE]}
    baselines |= {name: tally.strategies[name] for name in BASELINES if name in distributions}
    known = [line in fitted.by_line for line in held_out.first_lines]
    return EvaluationReport(
        num_train=len(train),
        best_single=train.arms[fitted.best_single],
        per_task={task: train.arms[place] for task, place in fitted.by_task.items()},
        policies=tuple(policies),
        overall=_compare(tally, slice(None)),
        by_domain={
            task: _compare(tally, slice(i, i + 1)) for i, task in enumerate(tally.sampled.tasks)
        },
        over={
            name: {
                baseline: _ratio(tally, place, tally.strategies[name])
                for baseline, place in baselines.items()
            }
            for name in policies
        },
        slowest={name: _slowest(tally, place) for name, place in tally.strategies.items()},
        by_seed={
            name: tuple(_speedup(held_out, distribution, extra[name]) for distribution in trained)
            for name, trained in policies.items()
        },
        known_first_lines=float(np.mean(known)) if known else None,
        notes=tuple(notes),
    )


def _speedup(data: Outcomes, distribution: np.ndarray, choose_seconds: float) -> float:
    none = data.seconds[:, data.arms.index(NONE)].sum()
    return float(none / ((distribution * data.seconds).sum() + choose_seconds * len(data)))


@dataclass(frozen=True, slots=True)
class _Tally:
    """Sums over the prompts of each task. The last axis is S: first fixed arms, then strategies."""

    arms: dict[str, int]  # name -> place in S
    strategies: dict[str, int]
    sampled: Resampled  # seconds
    num_tokens: np.ndarray  # [D]
    speedups: np.ndarray  # [D, S] of the prompts' own ratios
    rewards: np.ndarray  # [D, S]
    fastest: np.ndarray  # [D, S] prompts that got their fastest arm
    near: np.ndarray  # [D, S]
    chosen: dict[str, np.ndarray]  # strategy -> [D, A] prompts
    names: tuple[str, ...]  # A


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


def _tally(
    data: Outcomes,
    fitted: FittedStrategies,
    distributions: Mapping[str, np.ndarray],
    extra: Mapping[str, float],
    seed: int,
) -> _Tally:
    """Sum all figures by task. extra: seconds per choice, by strategy."""
    seconds, none = data.seconds, data.seconds[:, [data.arms.index(NONE)]]
    least = seconds.min(axis=1, keepdims=True)
    fixed = list(fitted.arms)

    def columns(by_arm: np.ndarray) -> np.ndarray:
        """Return [N, S] from a figure of each arm [N, A]."""
        expected = [(distribution * by_arm).sum(axis=1) for distribution in distributions.values()]
        return np.column_stack([by_arm[:, fixed], *expected])

    charged = np.array([0.0] * len(fixed) + list(extra.values()))  # [S]
    ratios = np.column_stack(
        [none / seconds[:, fixed]]
        + [
            (distribution * (none / (seconds + extra[name]))).sum(axis=1)
            for name, distribution in distributions.items()
        ]
    )
    sampled = resample(columns(seconds) + charged, data.domains, seed)
    member = np.array(sampled.tasks)[:, None] == np.array(data.domains, dtype=str)  # [D, N]
    return _Tally(
        arms={data.arms[place]: i for i, place in enumerate(fixed)},
        strategies={name: len(fixed) + i for i, name in enumerate(distributions)},
        sampled=sampled,
        num_tokens=member @ data.num_tokens,
        speedups=member @ ratios,
        rewards=member @ columns(data.rewards),
        fastest=member @ columns(seconds <= least * (1.0 + 1e-9)),
        near=member @ columns(seconds <= least * NEAR),
        chosen={name: member @ distribution for name, distribution in distributions.items()},
        names=data.arms,
    )


def _compare(tally: _Tally, part: slice) -> Comparison:
    return Comparison(
        num_prompts=int(tally.sampled.num[part].sum()),
        arms={name: _figures(tally, place, part) for name, place in tally.arms.items()},
        strategies={name: _figures(tally, place, part) for name, place in tally.strategies.items()},
        chosen={
            name: _chosen(counts[part].sum(axis=0), tally.names)
            for name, counts in tally.chosen.items()
        },
    )


def _figures(tally: _Tally, place: int, part: slice) -> Figures:
    """Return the figures of a place in S over the tasks of a slice."""
    none, oracle = tally.arms[NONE], tally.strategies[ORACLE]
    num, draws = tally.sampled.num[part].sum(), tally.sampled.draws[:, part].sum(axis=1)
    sums = tally.sampled.sums[part].sum(axis=0)  # [S]
    drawn = tally.sampled.drawn[:, part].sum(axis=1)  # [B, S]
    spent, spent_drawn = sums[place], drawn[:, place]
    lost, lost_drawn = spent - sums[oracle], spent_drawn - drawn[:, oracle]

    def mean(figure: np.ndarray) -> float:
        return float(figure[part, place].sum() / num)

    return Figures(
        speedup=interval(sums[none] / spent, divide(drawn[:, none], spent_drawn)),
        mean_speedup=mean(tally.speedups),
        tokens_per_second=float(tally.num_tokens[part].sum() / spent),
        seconds=float(spent),
        reward=mean(tally.rewards),
        regret_seconds=interval(lost / num, divide(lost_drawn, draws)),
        regret=interval(lost / sums[oracle], divide(lost_drawn, drawn[:, oracle])),
        accuracy=mean(tally.fastest),
        near=mean(tally.near),
    )


def _chosen(counts: np.ndarray, arms: Sequence[str]) -> Chosen:
    """Return the chosen arms. counts: [A] prompts by arm."""
    shares = counts / counts.sum()
    drafters: dict[str, float] = {}
    lengths: dict[str, float] = {}
    for arm, share in zip(arms, shares.tolist(), strict=True):
        drafter, length = split_arm(arm)
        shown = "-" if drafter == NONE else str(length or "own")
        drafters[drafter] = drafters.get(drafter, 0.0) + share
        lengths[shown] = lengths.get(shown, 0.0) + share
    return Chosen(dict(zip(arms, shares.tolist(), strict=True)), drafters, lengths)


def _ratio(tally: _Tally, reference: int, policy: int) -> Interval:
    """Return the speed of a policy over that of a reference, both given as places in S."""
    sums, drawn = tally.sampled.sums.sum(axis=0), tally.sampled.drawn.sum(axis=1)
    return interval(sums[reference] / sums[policy], drawn[:, reference] / drawn[:, policy])


def _slowest(tally: _Tally, place: int) -> SlowestTask:
    none = tally.arms[NONE]
    sampled = tally.sampled
    speeds = sampled.sums[:, none] / sampled.sums[:, place]  # [D]
    draws = divide(sampled.drawn[:, :, none], sampled.drawn[:, :, place])  # [B, D]
    least = int(speeds.argmin())
    return SlowestTask(sampled.tasks[least], interval(speeds[least], np.nanmin(draws, axis=1)))
