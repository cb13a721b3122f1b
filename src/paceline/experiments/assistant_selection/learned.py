"""Shared parts of the experiments with learned policies: priced prompts, trained policies, figures.

Figures are predicted from replay and the cost table unless an experiment says that they were clocked.
Task labels select prompts and name the rows of tables; no policy sees them. Symbols: N prompts, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE
from paceline.experiments.findings import SHARE, Panel, Series, columns
from paceline.learning.dataset import build_dataset, split
from paceline.learning.evaluation import Contender, Evaluator, train_contenders, unseen_part
from paceline.selection.choosers import Chooser, PortableChooser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from paceline.config import LearningSection
    from paceline.costs.table import CostTable
    from paceline.experiments.findings import Column, Value
    from paceline.experiments.workbench import Workbench
    from paceline.intervals import Interval
    from paceline.learning.dataset import Dataset
    from paceline.learning.evaluation import EvaluationReport
    from paceline.selection.choosers import Situation
    from paceline.store.records import CollectedPrompt

BEST_SINGLE: Final = "best single"
PER_TASK: Final = "per task"
ORACLE: Final = "oracle"
RANDOM: Final = "random"
FIRST_LINE: Final = "first line"
_SMOKE_EPOCHS: Final = 2
PREDICTED: Final = (
    "Speed-ups over `none` are predicted by replay and the cost table, on held-out prompts: the total "
    "seconds of `none` over those of the choice, with 95% bootstrap intervals over prompts."
)


@dataclass(frozen=True, slots=True)
class Study:
    """Priced prompts under a set of arms, in a training part and a held-out part.

    No drafter was trained on a prompt of the held-out part.
    """

    bench: Workbench
    settings: LearningSection
    train: Dataset
    held_out: Dataset

    @classmethod
    def of(
        cls,
        bench: Workbench,
        prompts: Sequence[CollectedPrompt],
        arms: Sequence[str],
        costs: CostTable | None = None,
        **learning: object,
    ) -> Self:
        """Price and split prompts. learning: changes to the configuration's section `learning`."""
        if bench.sizes.smoke:
            learning["max_epochs"] = _SMOKE_EPOCHS
        settings = bench.config.learning.model_copy(update=learning)
        costs = costs or bench.costs
        data, _ = build_dataset(bench.priced(prompts, costs), arms, costs, settings)
        if bench.sizes.smoke:  # of few prompts, a share by hash may be empty
            third = np.arange(len(data)) % 3 == 0
            return cls(bench, settings, data.rows(~third), data.rows(third))
        train, held_out = split(data, settings.held_out)
        return cls(bench, settings, train, unseen_part(held_out))

    def contenders(self, learners: Sequence[str], seeds: int = 1) -> list[Contender]:
        """Train policies on the training part."""
        return train_contenders(
            self.train, learners, [None], self.settings, seeds, self.bench.on_progress
        )

    def report(self, contenders: Sequence[Contender]) -> EvaluationReport:
        """Return the gains of policies and of the baselines on the held-out part."""
        evaluator = Evaluator(self.train, self.bench.decode, self.settings.seed)
        return evaluator.held_out(self.held_out, contenders, [1])[0].report


class Drafting(Chooser):
    """Another chooser with `none` excluded."""

    kind = "drafting"

    def __init__(self, inner: Chooser, data: Dataset) -> None:
        """data: prices for a chooser that takes them."""
        self.arms = inner.arms
        self._inner = inner
        if isinstance(inner, PortableChooser):
            inner.pricer = data.pricer()

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        preferences = np.array(self._inner.preferences(features, situation), dtype=np.float64)
        preferences[:, self.arms.index(NONE)] = -np.inf
        return preferences

    @classmethod
    def restore(
        cls, arms: Sequence[str], arrays: Mapping[str, np.ndarray], facts: Mapping[str, object]
    ) -> Drafting:
        raise ValueError("a chooser with an excluded arm is for comparison and cannot be saved")


def always_drafting(contender: Contender, data: Dataset) -> Contender:
    """Return the same policy with the arm `none` excluded."""
    choosers = tuple(Drafting(chooser, data) for chooser in contender.choosers)
    return Contender(f"{contender.name}, no {NONE}", choosers)


def unrewarding_none(study: Study) -> Study:
    """Return a study in which `none` never has the best reward, so that a policy compares drafters."""
    return replace(study, train=_unrewarding(study.train), held_out=_unrewarding(study.held_out))


def _unrewarding(data: Dataset) -> Dataset:
    rewards = data.rewards.copy()
    rewards[:, data.arms.index(NONE)] = rewards.min(axis=1)
    return replace(data, rewards=rewards)


def of_tasks(prompts: Sequence[CollectedPrompt], tasks: Sequence[str]) -> list[CollectedPrompt]:
    """Return the prompts of some tasks."""
    return [prompt for prompt in prompts if prompt.domain in tasks]


def tasks_of(prompts: Sequence[CollectedPrompt]) -> list[str]:
    """Return the tasks of prompts, sorted."""
    return sorted({prompt.domain for prompt in prompts})


# --- cells, tables and panels ---------------------------------------------------------------------


def interval(found: Interval) -> str:
    """Return a speed-up with its interval as text."""
    return f"{found.value:.2f}x ({found.low:.2f} to {found.high:.2f})"


def ways_table(
    report: EvaluationReport, ways: Sequence[str]
) -> tuple[list[Column], list[list[Value]]]:
    """Return the (columns, rows) of ways to choose: their gains and their slowest tasks."""
    heads = columns("chosen by", "speed-up over none", ("of the oracle", "{:.1%}"))
    heads += columns(("fastest arm", SHARE), ("within 2% of it", SHARE), "slowest task")
    heads += columns("its speed-up")
    rows: list[list[Value]] = []
    for way in ways:
        figures, slowest = report.overall.strategies[way], report.slowest[way]
        row: list[Value] = [way, interval(figures.speedup), figures.of_oracle]
        row += [figures.accuracy, figures.near, slowest.task, interval(slowest.speedup)]
        rows.append(row)
    return heads, rows


def interval_series(label: str, names: Sequence[str], found: Sequence[Interval]) -> Series:
    """Return bars of speed-ups with their intervals, one per name."""
    low, high = [f.low for f in found], [f.high for f in found]
    return Series(label, list(names), [f.value for f in found], low, high)


def speed_panel(title: str, series: list[Series]) -> Panel:
    """Return bars of predicted speed-ups."""
    return Panel(title, "predicted speed-up over none", series, kind="bars", baseline=1.0)


def speedup(report: EvaluationReport, way: str) -> float:
    """Return the speed-up over `none` of a way to choose."""
    return report.overall.strategies[way].speedup.value


def share(report: EvaluationReport, way: str, drafter: str, task: str | None = None) -> float:
    """Return the share of prompts, or of those of a task, that get a drafter at any length."""
    part = report.overall if task is None else report.by_domain[task]
    return part.chosen[way].drafters.get(drafter, 0.0)
