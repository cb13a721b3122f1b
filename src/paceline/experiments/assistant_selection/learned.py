"""What the experiments with learned policies share: priced prompts, trained policies, their figures.

Everything is predicted from replay and the cost table unless an experiment says that it was clocked.
Task labels choose prompts and head tables; no policy sees one. Symbols: N prompts, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE
from paceline.experiments.findings import Column
from paceline.learning.dataset import build_dataset, split
from paceline.learning.evaluation import Contender, Evaluator, train_contenders
from paceline.selection.choosers import Chooser, PortableChooser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from paceline.config import LearningSection
    from paceline.contracts import CollectedPrompt
    from paceline.costs.table import CostTable
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench
    from paceline.learning.dataset import Dataset
    from paceline.learning.evaluation import EvaluationReport
    from paceline.learning.evaluation.bootstrap import Interval
    from paceline.selection.choosers import Situation

SPEED: Final = "{:.2f}x"
SHARE: Final = "{:.0%}"
BEST_SINGLE: Final = "best single"
PER_TASK: Final = "per task"
ORACLE: Final = "oracle"
RANDOM: Final = "random"
FIRST_LINE: Final = "first line"
_SMOKE_EPOCHS: Final = 2
PREDICTED: Final = (
    "Speed-ups over `none` are predicted by replay and the cost table, on held-out prompts: all "
    "seconds of `none` over all seconds of the choice, with 95% bootstrap intervals over prompts."
)


@dataclass(frozen=True, slots=True)
class Study:
    """Some prompts under some arms, priced, in two parts."""

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
        """learning: settings of the configuration's section `learning` that are others here."""
        if bench.sizes.smoke:
            learning["max_epochs"] = _SMOKE_EPOCHS
        settings = bench.config.learning.model_copy(update=learning)
        costs = costs or bench.costs
        data, _ = build_dataset(bench.priced(prompts, costs), arms, costs, settings)
        if bench.sizes.smoke:  # of so few prompts a share by hash may be none
            third = np.arange(len(data)) % 3 == 0
            return cls(bench, settings, data.rows(~third), data.rows(third))
        return cls(bench, settings, *split(data, settings.held_out))

    def contenders(self, learners: Sequence[str], seeds: int = 1) -> list[Contender]:
        """Policies trained on the training part."""
        return train_contenders(
            self.train, learners, [None], self.settings, seeds, self.bench.on_progress
        )

    def report(self, contenders: Sequence[Contender]) -> EvaluationReport:
        """What they and the ways they must beat gain on the held-out part."""
        evaluator = Evaluator(self.train, self.bench.decode, self.settings.seed)
        return evaluator.held_out(self.held_out, contenders, [1])[0].report


class Drafting(Chooser):
    """Another chooser that must not take `none`: a policy without that arm."""

    kind = "drafting"

    def __init__(self, inner: Chooser, data: Dataset) -> None:
        """data: its prices are used, where the chooser takes any."""
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
        raise ValueError("a barred arm is for comparison and is never saved")


def always_drafting(contender: Contender, data: Dataset) -> Contender:
    """The same policy without the arm `none`."""
    choosers = tuple(Drafting(chooser, data) for chooser in contender.choosers)
    return Contender(f"{contender.name}, no {NONE}", choosers)


def unrewarding_none(study: Study) -> Study:
    """With `none` never the best rewarded arm, so that a policy learns to tell drafters apart."""
    return replace(study, train=_unrewarding(study.train), held_out=_unrewarding(study.held_out))


def _unrewarding(data: Dataset) -> Dataset:
    rewards = data.rewards.copy()
    rewards[:, data.arms.index(NONE)] = rewards.min(axis=1)
    return replace(data, rewards=rewards)


def of_tasks(prompts: Sequence[CollectedPrompt], tasks: Sequence[str]) -> list[CollectedPrompt]:
    return [prompt for prompt in prompts if prompt.domain in tasks]


def tasks_of(prompts: Sequence[CollectedPrompt]) -> list[str]:
    return sorted({prompt.domain for prompt in prompts})


# --- figures as cells -----------------------------------------------------------------------------


def interval(found: Interval) -> str:
    """A speed-up with its interval."""
    return f"{found.value:.2f}x ({found.low:.2f} to {found.high:.2f})"


def ways_table(
    report: EvaluationReport, ways: Sequence[str]
) -> tuple[list[Column], list[list[Value]]]:
    """(columns, rows) of ways to choose: what they gain, and where they are slowest."""
    columns = [Column("chosen by"), Column("speed-up over none"), Column("of the oracle", "{:.1%}")]
    columns += [Column("fastest arm", SHARE), Column("within 2% of it", SHARE)]
    columns += [Column("slowest task"), Column("its speed-up")]
    rows: list[list[Value]] = []
    for way in ways:
        figures, slowest = report.overall.strategies[way], report.slowest[way]
        row: list[Value] = [way, interval(figures.speedup), figures.of_oracle]
        row += [figures.accuracy, figures.near, slowest.task, interval(slowest.speedup)]
        rows.append(row)
    return columns, rows


def speedup(report: EvaluationReport, way: str) -> float:
    return report.overall.strategies[way].speedup.value


def share(report: EvaluationReport, way: str, drafter: str, task: str | None = None) -> float:
    """Of the prompts, or of a task's, that get a drafter at any length."""
    part = report.overall if task is None else report.by_domain[task]
    return part.chosen[way].drafters.get(drafter, 0.0)
