"""Published per-prompt timings as arrays, and the gains of ways of choosing on them.

Every number compares arms that one run measured on one machine. Speed-up: mean milliseconds per token
of plain decoding over those of the chosen arms; each task has the same weight. Symbols: P prompts of a
task, A arms, the first of them `none`.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from paceline.contracts import NONE
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Milliseconds = NDArray[np.float64]  # [P, A] of a task

COLUMNS: Final = (
    "run", "target", "drafter", "dataset_path", "temperature", "example_id", "tpot_ms",
)  # fmt: skip
_SPLITS: Final = 200


class TaskRun(NamedTuple):
    """One target at one temperature on one task, as measured by one run."""

    run: str
    target: str
    temperature: str
    task: str


@dataclass(frozen=True, slots=True)
class TaskTimings:
    """The arms of a task run on the prompts that all of them answered."""

    arms: list[str]
    prompts: list[str]
    ms: Milliseconds

    def only(self, arms: Sequence[str], prompts: Sequence[str] | None = None) -> TaskTimings:
        """Return these arms, in this order, on these prompts."""
        kept = self.prompts if prompts is None else list(prompts)
        rows = [self.prompts.index(prompt) for prompt in kept]
        columns = [self.arms.index(arm) for arm in arms]
        return TaskTimings(list(arms), kept, self.ms[np.ix_(rows, columns)])


@dataclass(frozen=True, slots=True)
class Group:
    """One target at one temperature in one run: the arms that were measured on all tasks."""

    run: str
    target: str
    temperature: str
    arms: list[str]
    tasks: dict[str, Milliseconds]


def read_timings(path: Path) -> dict[TaskRun, TaskTimings]:
    """Return the task runs of a CSV that have plain decoding (an empty drafter) and a drafter.

    Raises ConfigError that names the wrong line.
    """
    found: dict[TaskRun, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path}: no column '{missing[0]}'")
        for line in lines:
            cell = TaskRun(line["run"], line["target"], line["temperature"], line["dataset_path"])
            by_prompt = found[cell][line["drafter"] or NONE]
            ms = _milliseconds(line["tpot_ms"], f"{path}:{lines.line_num}")
            if line["example_id"] in by_prompt:
                raise ConfigError(f"{path}:{lines.line_num}: this prompt was timed twice")
            by_prompt[line["example_id"]] = ms
    cells = {cell: _timed(by_arm) for cell, by_arm in found.items() if NONE in by_arm}
    return {cell: timed for cell, timed in cells.items() if len(timed.arms) > 1 and timed.prompts}


def _milliseconds(text: str | None, where: str) -> float:
    try:
        ms = float(text or "")
    except ValueError:
        ms = float("nan")
    if not 0 < ms < float("inf"):
        raise ConfigError(f"{where}: tpot_ms must be a positive number, got {text!r}")
    return ms


def _timed(by_arm: dict[str, dict[str, float]]) -> TaskTimings:
    arms = [NONE, *(arm for arm in by_arm if arm != NONE)]
    prompts = sorted(set.intersection(*(set(by_arm[arm]) for arm in arms)))
    ms = [[by_arm[arm][prompt] for arm in arms] for prompt in prompts]
    return TaskTimings(
        arms, prompts, np.array(ms, dtype=np.float64).reshape(len(prompts), len(arms))
    )


def whole_groups(cells: dict[TaskRun, TaskTimings]) -> list[Group]:
    """Return the groups whose run measured a drafter on every task of the file."""
    tasks = sorted({cell.task for cell in cells})
    by_group: dict[tuple[str, str, str], dict[str, TaskTimings]] = defaultdict(dict)
    for cell, timed in cells.items():
        by_group[cell.target, cell.temperature, cell.run][cell.task] = timed
    groups = []
    for (target, temperature, run), by_task in sorted(by_group.items()):
        if len(by_task) < len(tasks):
            continue
        first = by_task[tasks[0]].arms
        arms = [arm for arm in first if all(arm in timed.arms for timed in by_task.values())]
        if len(arms) > 1:
            of_task = {task: by_task[task].only(arms).ms for task in tasks}
            groups.append(Group(run, target, temperature, arms, of_task))
    return groups


# --- ways of choosing -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gains:
    """Speed-up over plain decoding of every way to choose; all but random may choose `none`.

    fair: chosen on half of the prompts and scored on the other half, averaged over many halvings.
    """

    random: float  # a random drafter, never `none`
    best_single: float
    best_arm: str
    best_single_fair: float
    per_task: float
    per_task_arms: dict[str, str]
    per_task_fair: float
    per_prompt: float


def gains(group: Group, seed: int = 0) -> Gains:
    """Return the gains of each way of choosing on one group."""
    tasks = list(group.tasks.values())
    means = np.array([ms.mean(axis=0) for ms in tasks])  # [tasks, A]
    plain = means[:, 0].mean()
    best = int(means.mean(axis=0).argmin())
    of_tasks = means.argmin(axis=1)
    single_fair, per_task_fair = _halved(tasks, seed)
    return Gains(
        random=plain / means[:, 1:].mean(),
        best_single=plain / means[:, best].mean(),
        best_arm=group.arms[best],
        best_single_fair=single_fair,
        per_task=plain / means.min(axis=1).mean(),
        per_task_arms={task: group.arms[i] for task, i in zip(group.tasks, of_tasks, strict=True)},
        per_task_fair=per_task_fair,
        per_prompt=plain / np.mean([ms.min(axis=1).mean() for ms in tasks]),
    )


def _halved(tasks: Sequence[Milliseconds], seed: int) -> tuple[float, float]:
    """Return (best single, per task), chosen on one half of each task's prompts, scored on the other."""
    rng = np.random.default_rng(seed)
    plain, single, per_task = 0.0, 0.0, 0.0
    for _ in range(_SPLITS):
        halves = [_halve(ms, rng) for ms in tasks]
        for seen, scored in ((0, 1), (1, 0)):
            known = np.array([half[seen].mean(axis=0) for half in halves])  # [tasks, A]
            other = np.array([half[scored].mean(axis=0) for half in halves])
            plain += other[:, 0].sum()
            single += other[:, known.mean(axis=0).argmin()].sum()
            per_task += np.take_along_axis(other, known.argmin(axis=1)[:, None], axis=1).sum()
    return plain / single, plain / per_task


def _halve(ms: Milliseconds, rng: np.random.Generator) -> tuple[Milliseconds, Milliseconds]:
    order = rng.permutation(len(ms))
    half = max(1, len(ms) // 2)
    return ms[order[:half]], ms[order[half:]]


@dataclass(frozen=True, slots=True)
class Repeated:
    """Speed-ups on prompts with two measurements: chosen in one of them and scored in the other."""

    num_prompts: int
    per_task_seen: float  # chosen and scored in the same measurement, as by the oracle
    per_prompt_seen: float
    per_task: float  # chosen in the other measurement
    per_prompt: float
    same_choice: float  # share of prompts whose best arm is the same in both
    by_chance: (
        float  # that share if the choices were independent, with the same frequencies of arms
    )


def repeated(pairs: Sequence[tuple[Milliseconds, Milliseconds]]) -> Repeated:
    """Compare two measurements in both directions.

    pairs: per task, both measurements [P, A] of the same prompts and arms.
    """
    plain = seen_task = seen_prompt = task = prompt = 0.0
    num_same, by_chance, num = 0, 0.0, 0
    for one, other in pairs:
        for chosen, scored in ((one, other), (other, one)):
            rows = np.arange(len(scored))
            # each task has the same weight, for any number of prompts
            plain += scored[:, 0].mean()
            seen_task += scored.mean(axis=0).min()
            seen_prompt += scored.min(axis=1).mean()
            task += scored[:, chosen.mean(axis=0).argmin()].mean()
            prompt += scored[rows, chosen.argmin(axis=1)].mean()
        first, second = one.argmin(axis=1), other.argmin(axis=1)
        num += len(one)
        num_same += int((first == second).sum())
        shares = [np.bincount(best, minlength=one.shape[1]) / len(one) for best in (first, second)]
        by_chance += float(shares[0] @ shares[1]) * len(one)
    return Repeated(
        num_prompts=num,
        per_task_seen=plain / seen_task,
        per_prompt_seen=plain / seen_prompt,
        per_task=plain / task,
        per_prompt=plain / prompt,
        same_choice=num_same / num,
        by_chance=by_chance / num,
    )
