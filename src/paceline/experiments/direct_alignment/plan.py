"""The runs of the comparison: a training each, named by all that it depends on. Knows no model.

Parts share runs: a run that two parts need is in the plan of both and is made once. The learning rate of
a loss, and the loss of the parts on data, follow from finished runs, so the plan has stages.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from paceline.config import Section
from paceline.distillation.settings import DistillSettings, LossName, StudentShape
from paceline.errors import ConfigError, suggest_name
from paceline.experiments.prompt_files import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping

BASELINE: Final[LossName] = "cross_entropy"
PAPER: Final[LossName] = "tvd++"  # the loss that the paper proposes
LENGTHS: Final = (3, 5)
"""Draft lengths K of the tables."""
SAMPLED: Final = 0.7
"""Temperature of the sampled answers."""
# all but `tvd++_position`, a variant of `tvd++`
_LOSSES: Final[tuple[LossName, ...]] = (
    "cross_entropy",
    "kl",
    "reverse_kl",
    "jensen_shannon",
    "tvd",
    "tvd++",
    "negative_log_acceptance",
    "lk_hybrid",
)
_RATES: Final = (3e-4, 1e-3, 3e-3)
_PRETRAINING_RATE: Final = 3e-3

Answers = Literal["greedy", "sampled", "both"]


@dataclass(frozen=True, slots=True)
class Budget:
    """The sizes of a comparison. Numbers of prompts and answers are over all tasks unless per task.

    answers: numbers of answers to compare, of which the last is that of all other runs; sampled: prompts
    of the runs that compare greedy with sampled answers; tokens: read by each run.
    """

    name: str
    answers: tuple[int, ...]
    sampled: int
    tokens: int
    pretrain_tokens: int
    losses: tuple[LossName, ...] = _LOSSES
    rates: tuple[float, ...] = _RATES
    seeds: int = 3  # of the losses
    data_seeds: int = 1  # of the other parts
    judging: int = 60  # per task
    validation: int = 40  # per task
    clocked: int = 8  # per task
    max_new_tokens: int = 256
    batch_tokens: int = 1024
    validations: int = 4  # per run
    top_k: int = 32
    shape: StudentShape | None = None  # None: `small`
    cost_tokens: int = 60_000  # to time each teacher on
    gradient_draws: int = 64

    def settings(self) -> DistillSettings:
        """Return the settings that all runs share."""
        return DistillSettings(
            size="small",
            shape=self.shape,
            embedding_init="svd",
            max_new_tokens=self.max_new_tokens,
            teacher="cached",
            teacher_top_k=self.top_k,
            teacher_temperature=1.0,
            prompt_weight=0.2,
            batch_tokens=self.batch_tokens,
            final_learning_rate=0.02,
            warmup_share=0.03,
            weight_decay=0.05,
            max_gradient_norm=1.0,
            autocast=False,  # the same arithmetic on every processor
            dtype="bfloat16",
        )


_TINY: Final = StudentShape(num_layers=1, hidden_size=16, mlp_size=24, num_heads=2, num_kv_heads=1)
BUDGETS: Final[Mapping[str, Budget]] = MappingProxyType(
    {
        "small": Budget(
            "small", (1_000, 2_000, 5_000), sampled=2_000, tokens=400_000, pretrain_tokens=2_000_000
        ),
        "full": Budget(
            "full",
            (1_000, 2_000, 5_000, 10_000, 20_000),
            sampled=5_000,
            tokens=3_000_000,
            pretrain_tokens=6_000_000,
            data_seeds=3,
            judging=150,
            validation=80,
            clocked=20,
            batch_tokens=2048,
            validations=6,
            cost_tokens=300_000,
            gradient_draws=256,
        ),
    }
)
SMOKE: Final = Budget(
    "smoke",
    (8, 16),
    sampled=8,
    tokens=1_200,
    pretrain_tokens=600,
    losses=("cross_entropy", "kl", "tvd++"),
    rates=(1e-3, 1e-2),
    seeds=2,
    judging=3,
    validation=2,
    clocked=1,
    max_new_tokens=12,
    batch_tokens=256,
    validations=2,
    top_k=8,
    shape=_TINY,
    cost_tokens=400,
    gradient_draws=4,
)


def find_budget(name: str) -> Budget:
    """Return a budget by name. Raises ConfigError if there is none."""
    if name not in BUDGETS:
        raise ConfigError(
            f"there is no budget '{name}'{suggest_name(name, BUDGETS)}; choose one of "
            f"{', '.join(BUDGETS)}"
        )
    return BUDGETS[name]


class Run(Section):
    """One training of a student: all of its configuration that differs between runs of a budget.

    An alignment begins with the weights of the pre-training of its seed. num_answers: size of the pool
    of all tasks, of which the run has those of `tasks`. tokens: read by the student.
    """

    phase: Literal["pretrain", "align"] = "align"
    loss: LossName
    learning_rate: float
    seed: int
    tasks: tuple[str, ...] = TASKS
    num_answers: int
    answers: Answers = "greedy"
    tokens: int

    @property
    def id(self) -> str:
        """A short name for files, which depends on all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The learning rate of each loss, by validation, and the best loss other than the baseline."""

    rates: Mapping[LossName, float]
    best: LossName


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of a budget. Methods name the same run in every part that uses it."""

    budget: Budget

    # --- single runs --------------------------------------------------------------------------

    def of_loss(self, loss: LossName, rate: float, seed: int) -> Run:
        """Return the run of a loss on the greedy answers of all tasks."""
        return self._run(loss, rate, seed)

    def pretrained(self, seed: int) -> Run:
        """Return the pre-training on text."""
        return Run(
            phase="pretrain",
            loss=BASELINE,
            learning_rate=_PRETRAINING_RATE,
            seed=seed,
            num_answers=0,
            tokens=self.budget.pretrain_tokens,
        )

    def on_answers(self, tuned: Tuned, loss: LossName, answers: Answers, seed: int) -> Run:
        """Return the run on greedy or sampled answers, or both, to the same prompts."""
        own = self._run(loss, tuned.rates[loss], seed)
        return own.model_copy(update={"num_answers": self.budget.sampled, "answers": answers})

    def without_task(self, tuned: Tuned, loss: LossName, task: str | None, seed: int) -> Run:
        """Return the run on all tasks but one, or on all."""
        tasks = tuple(name for name in TASKS if name != task)
        own = self._run(loss, tuned.rates[loss], seed)
        return own.model_copy(update={"tasks": tasks})

    def specialist(self, tuned: Tuned, task: str, seed: int) -> Run:
        """Return the run on one task, with as many tokens as a run on all tasks."""
        return self._best(tuned, seed).model_copy(update={"tasks": (task,)})

    def with_answers(self, tuned: Tuned, num_answers: int, seed: int) -> Run:
        """Return the run on a number of answers, with as many tokens as on all."""
        return self._best(tuned, seed).model_copy(update={"num_answers": num_answers})

    def _best(self, tuned: Tuned, seed: int) -> Run:
        return self.of_loss(tuned.best, tuned.rates[tuned.best], seed)

    def _run(self, loss: LossName, rate: float, seed: int) -> Run:
        return Run(
            loss=loss,
            learning_rate=rate,
            seed=seed,
            num_answers=self.budget.answers[-1],
            tokens=self.budget.tokens,
        )

    # --- stages -------------------------------------------------------------------------------

    @property
    def seeds(self) -> range:
        """The seeds of the parts on data."""
        return range(self.budget.data_seeds)

    def pretrainings(self) -> list[Run]:
        """Return the first stage, with whose students all other runs begin."""
        return [self.pretrained(s) for s in range(max(self.budget.seeds, self.budget.data_seeds))]

    def sweep(self) -> list[Run]:
        """Return the second stage: every loss at every rate with one seed."""
        own = self.budget
        return [self.of_loss(loss, rate, 0) for loss in own.losses for rate in own.rates]

    def of_losses(self, tuned: Tuned) -> list[Run]:
        """Return the third stage: every loss at its rate with every seed."""
        return [
            self.of_loss(loss, tuned.rates[loss], seed)
            for loss in self.budget.losses
            for seed in range(self.budget.seeds)
        ]

    def of_data(self, tuned: Tuned) -> list[Run]:
        """Return the fourth stage: the parts on data, each run once."""
        runs: list[Run] = []
        for seed in self.seeds:
            for loss in compared_on_answers(tuned):
                for answers in ("greedy", "sampled", "both"):
                    runs.append(self.on_answers(tuned, loss, answers, seed))
            for loss in compared_without_task(tuned):
                for task in (*TASKS, None):
                    runs.append(self.without_task(tuned, loss, task, seed))
            runs += [self.specialist(tuned, task, seed) for task in TASKS]
            runs += [self.with_answers(tuned, num, seed) for num in self.budget.answers]
        return list(dict.fromkeys(runs))


def compared_on_answers(tuned: Tuned) -> tuple[LossName, ...]:
    """Return the losses that are compared on greedy and sampled answers."""
    return (BASELINE, tuned.best)


def compared_without_task(tuned: Tuned) -> tuple[LossName, ...]:
    """Return the losses that are compared on a task left out: the paper's own and the best one."""
    return tuple(dict.fromkeys((PAPER, tuned.best)))


def balance(available: Mapping[str, int], total: int) -> dict[str, int]:
    """Return numbers per task that sum to `total`, as equal as the available ones allow.

    If fewer are available than `total`, all of them are returned.
    """
    given: dict[str, int] = {}
    left = total
    ascending = sorted(available, key=lambda task: (available[task], task))
    for i, task in enumerate(ascending):
        given[task] = min(available[task], left // (len(ascending) - i))
        left -= given[task]
    return {task: given[task] for task in available}
