"""The alignment reward of policies on prompts they never saw, where only texts are known.

Next to a policy stand every single arm, a random one, the best arm of the training part, the best arm
per task of the training part, and the oracle, which knows the best arm of each prompt. Figures are mean
rewards, never speeds. Symbols: N prompts, A arms, S strategies.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.learning.evaluation.bootstrap import Resampled, interval, resample
from paceline.learning.evaluation.strategies import (
    BEST_SINGLE,
    ORACLE,
    PER_TASK,
    POLICY,
    RANDOM,
)
from paceline.terminal import BandedTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from paceline.config import LearningSection
    from paceline.intervals import Interval
    from paceline.learning.dataset import Dataset
    from paceline.selection.choosers import Chooser

__all__ = ["POLICY", "TextReport", "judge", "show_texts"]


@dataclass(frozen=True, slots=True)
class TextReport:
    """Mean rewards on held-out prompts, with 95% intervals over prompts.

    arms and strategies: by name. over_best_single: by policy, its reward minus that of the best single
    arm, paired by prompt. by_domain: task -> strategy -> mean reward. chosen: by policy, the share of
    prompts of each arm.
    """

    num_train: int
    num_prompts: int
    alpha: float
    metric: str
    best_single: str
    policies: tuple[str, ...]
    arms: dict[str, Interval]
    strategies: dict[str, Interval]
    over_best_single: dict[str, Interval]
    by_domain: dict[str, dict[str, float]]
    chosen: dict[str, dict[str, float]]
    notes: tuple[str, ...]

    def headline(self) -> dict[str, object]:
        """Return the most important figures, for a policy's card."""
        main = (self.policies[0], BEST_SINGLE, ORACLE)
        return {
            "num_prompts": self.num_prompts,
            "reward": {name: self.strategies[name].value for name in main},
            "chosen": self.chosen[self.policies[0]],
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def judge(
    train: Dataset,
    held_out: Dataset,
    policies: Mapping[str, Sequence[Chooser]],
    section: LearningSection,
    notes: Sequence[str] = (),
) -> TextReport:
    """Compare policies by their rewards on the held-out part.

    policies: by name, one chooser per training; their mean counts. section: gives the reward's alpha and
    metric, and the seed of the resampling.
    """
    best = int(train.rewards.mean(axis=0).argmax())
    choices = _strategies(train, held_out, best)
    for name, choosers in policies.items():
        found = [c.distribution(c.preferences(held_out.features, held_out.situation()))
                 for c in choosers]  # fmt: skip
        choices[name] = np.mean(found, axis=0)
    choices[ORACLE] = np.eye(len(held_out.arms))[held_out.rewards.argmax(axis=1)]
    names = [*held_out.arms, *choices]
    earned = np.column_stack(
        [held_out.rewards, *((own * held_out.rewards).sum(axis=1) for own in choices.values())]
    )  # [N, A + S]
    sampled = resample(earned, held_out.domains, section.seed)
    place = {name: len(held_out.arms) + i for i, name in enumerate(choices)}
    speeds = (
        f"speeds are unknown: {', '.join(a for a in held_out.arms if a != 'none')} are known by their "
        "texts alone, so these are alignment rewards, not seconds"
    )
    return TextReport(
        num_train=len(train),
        num_prompts=len(held_out),
        alpha=section.alpha,
        metric=section.metric,
        best_single=held_out.arms[best],
        policies=tuple(policies),
        arms={name: _mean(sampled, i) for i, name in enumerate(held_out.arms)},
        strategies={name: _mean(sampled, i) for name, i in place.items()},
        over_best_single={
            name: _mean(sampled, place[name], place[BEST_SINGLE]) for name in policies
        },
        by_domain={
            task: dict(zip(names, (sampled.sums[i] / sampled.num[i]).tolist(), strict=True))
            for i, task in enumerate(sampled.tasks)
        },
        chosen={
            name: dict(zip(held_out.arms, choices[name].mean(axis=0).tolist(), strict=True))
            for name in policies
        },
        notes=(speeds, *notes),
    )


def _strategies(train: Dataset, held_out: Dataset, best: int) -> dict[str, np.ndarray]:
    """Return the probability [N, A] of each arm under the strategies that are no policies."""
    N, A = held_out.rewards.shape
    single = np.eye(A)
    domains = np.array(train.domains, dtype=str)
    by_task = {
        task: int(train.rewards[domains == task].mean(axis=0).argmax()) for task in set(domains)
    }
    return {
        RANDOM: np.full((N, A), 1.0 / A),
        BEST_SINGLE: np.tile(single[best], (N, 1)),
        PER_TASK: single[[by_task.get(task, best) for task in held_out.domains]],
    }


def _mean(sampled: Resampled, place: int, minus: int | None = None) -> Interval:
    """Return the mean of a column over all prompts, or of its difference to another column."""
    sums, drawn = sampled.sums.sum(axis=0), sampled.drawn.sum(axis=1)
    value, draws = sums[place], drawn[:, place]
    if minus is not None:
        value, draws = value - sums[minus], draws - drawn[:, minus]
    return interval(value / sampled.num.sum(), draws / sampled.draws.sum(axis=1))


def show_texts(console: Console, report: TextReport) -> None:
    """Print all arms and strategies, the policies' choices and the notes."""
    facts = f"alpha {report.alpha:g}, {report.metric}"
    shown = BandedTable(title=f"alignment reward on held-out prompts ({facts})")
    shown.add_column(f"{report.num_prompts} prompts")
    tasks = list(report.by_domain) if len(report.by_domain) > 1 else []
    for name in ("reward (95%)", *tasks):
        shown.add_column(name, justify="right")

    def add(name: str, figure: Interval, **style: Any) -> None:
        cells = (f"{report.by_domain[task][name]:.3f}" for task in tasks)
        shown.add_row(
            name, f"{figure.value:.3f} ({figure.low:.3f}-{figure.high:.3f})", *cells, **style
        )

    for name, figure in report.arms.items():
        add(name, figure)
    shown.add_section()
    for name, figure in report.strategies.items():
        add(name, figure, style="bold green" if name in report.policies else "")
    console.print(shown)
    for policy in report.policies:
        shares = sorted(report.chosen[policy].items(), key=lambda item: -item[1])
        chosen = ", ".join(f"{name} {share:.0%}" for name, share in shares if share > 0)
        lines = [f"{policy} chose {chosen}"]
        over = report.over_best_single[policy]
        lines.append(
            f"{policy} over best single ({report.best_single}): {over.value:+.3f} "
            f"(95%: {over.low:+.3f} to {over.high:+.3f})"
        )
        for line in lines:
            console.print(line, markup=False, highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
