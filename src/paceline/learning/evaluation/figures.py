"""The figures of strategies on prompts, from sums by task and their resamples.

Symbols: N prompts, A arms, S strategies, D tasks, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE, split_arm
from paceline.learning.evaluation.bootstrap import Resampled, divide, interval, resample
from paceline.learning.evaluation.strategies import ORACLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.intervals import Interval
    from paceline.learning.evaluation.strategies import FittedStrategies, Outcomes

NEAR: Final = 1.02
"""An arm is nearly as good as the fastest if it takes at most this many times its seconds."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one strategy on a set of prompts.

    speedup: seconds of `none` for all prompts over seconds of this strategy, so that requests weigh in
    proportion to their time. mean_speedup: the mean of the prompts' own ratios. reward: its mean.
    regret_seconds: mean extra seconds of a request compared with its fastest arm; regret: the same as
    a share of the oracle's seconds. accuracy: share of prompts that get the fastest arm; near: share
    that get an arm that takes at most 2% longer. A ceiling takes no single arm, so it has no reward,
    accuracy or near.
    """

    speedup: Interval
    mean_speedup: float
    tokens_per_second: float
    seconds: float
    reward: float | None
    regret_seconds: Interval
    regret: Interval
    accuracy: float | None
    near: float | None

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
    policies, oracle (the fastest arm of each request, known afterwards), and the ceilings where they are
    known. chosen: by strategy.
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
class Tally:
    """Sums over the prompts of each task. The last axis is S: first fixed arms, then strategies."""

    arms: dict[str, int]  # name -> place in S
    strategies: dict[str, int]
    sampled: Resampled  # seconds
    num_tokens: np.ndarray  # [D]
    speedups: np.ndarray  # [D, S] of the prompts' own ratios
    rewards: np.ndarray  # [D, S]; NaN for ceilings, as the next two
    fastest: np.ndarray  # [D, S] prompts that got their fastest arm
    near: np.ndarray  # [D, S]
    chosen: dict[str, np.ndarray]  # strategy -> [D, A] prompts
    names: tuple[str, ...]  # A


def tally_by_task(
    data: Outcomes,
    fitted: FittedStrategies,
    distributions: Mapping[str, np.ndarray],
    extra: Mapping[str, float],
    seed: int,
) -> Tally:
    """Sum all figures by task. extra: seconds per choice, by strategy."""
    seconds, none = data.seconds, data.seconds[:, [data.arms.index(NONE)]]
    least = seconds.min(axis=1, keepdims=True)
    fixed = list(fitted.arms)

    def columns(by_arm: np.ndarray) -> np.ndarray:
        """Return [N, S] from a figure of each arm [N, A]."""
        expected = [(distribution * by_arm).sum(axis=1) for distribution in distributions.values()]
        unknown = np.full((len(data), len(data.ceilings)), np.nan)
        return np.column_stack([by_arm[:, fixed], *expected, unknown])

    charged = np.array([0.0] * len(fixed) + list(extra.values()))
    ratios = np.column_stack(
        [none / seconds[:, fixed]]
        + [
            (distribution * (none / (seconds + extra[name]))).sum(axis=1)
            for name, distribution in distributions.items()
        ]
        + [none[:, 0] / bound for bound in data.ceilings.values()]
    )
    spent = columns(seconds)  # [N, S]
    spent[:, : len(charged)] += charged
    spent[:, len(charged) :] = np.array(list(data.ceilings.values())).reshape(-1, len(data)).T
    sampled = resample(spent, data.domains, seed)
    member = np.array(sampled.tasks)[:, None] == np.array(data.domains, dtype=str)  # [D, N]
    return Tally(
        arms={data.arms[place]: i for i, place in enumerate(fixed)},
        strategies={
            name: len(fixed) + i for i, name in enumerate([*distributions, *data.ceilings])
        },
        sampled=sampled,
        num_tokens=member @ data.num_tokens,
        speedups=member @ ratios,
        rewards=member @ columns(data.rewards),
        fastest=member @ columns(seconds <= least * (1.0 + 1e-9)),
        near=member @ columns(seconds <= least * NEAR),
        chosen={name: member @ distribution for name, distribution in distributions.items()},
        names=data.arms,
    )


def compare(tally: Tally, part: slice) -> Comparison:
    return Comparison(
        num_prompts=int(tally.sampled.num[part].sum()),
        arms={name: _figures(tally, place, part) for name, place in tally.arms.items()},
        strategies={name: _figures(tally, place, part) for name, place in tally.strategies.items()},
        chosen={
            name: _chosen(counts[part].sum(axis=0), tally.names)
            for name, counts in tally.chosen.items()
        },
    )


def _figures(tally: Tally, place: int, part: slice) -> Figures:
    """Return the figures of a place in S over the tasks of a slice."""
    none, oracle = tally.arms[NONE], tally.strategies[ORACLE]
    num, draws = tally.sampled.num[part].sum(), tally.sampled.draws[:, part].sum(axis=1)
    sums = tally.sampled.sums[part].sum(axis=0)  # [S]
    drawn = tally.sampled.drawn[:, part].sum(axis=1)  # [B, S]
    spent, spent_drawn = sums[place], drawn[:, place]
    lost, lost_drawn = spent - sums[oracle], spent_drawn - drawn[:, oracle]

    def mean(figure: np.ndarray) -> float:
        return float(figure[part, place].sum() / num)

    def known(figure: np.ndarray) -> float | None:
        return None if np.isnan(figure[part, place]).any() else mean(figure)

    return Figures(
        speedup=interval(sums[none] / spent, divide(drawn[:, none], spent_drawn)),
        mean_speedup=mean(tally.speedups),
        tokens_per_second=float(tally.num_tokens[part].sum() / spent),
        seconds=float(spent),
        reward=known(tally.rewards),
        regret_seconds=interval(lost / num, divide(lost_drawn, draws)),
        regret=interval(lost / sums[oracle], divide(lost_drawn, drawn[:, oracle])),
        accuracy=known(tally.fastest),
        near=known(tally.near),
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


def ratio(tally: Tally, reference: int, policy: int) -> Interval:
    """Return the speed of a policy over that of a reference, both given as places in S."""
    sums, drawn = tally.sampled.sums.sum(axis=0), tally.sampled.drawn.sum(axis=1)
    return interval(sums[reference] / sums[policy], drawn[:, reference] / drawn[:, policy])


def find_slowest(tally: Tally, place: int) -> SlowestTask:
    none = tally.arms[NONE]
    sampled = tally.sampled
    speeds = sampled.sums[:, none] / sampled.sums[:, place]  # [D]
    draws = divide(sampled.drawn[:, :, none], sampled.drawn[:, :, place])  # [B, D]
    least = int(speeds.argmin())
    return SlowestTask(sampled.tasks[least], interval(speeds[least], np.nanmin(draws, axis=1)))
