"""The comparison from prompts to page. What is finished is never made again.

Finished runs are lines of the results, unfinished ones checkpoints in the working folder.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from filelock import FileLock, Timeout

from paceline.bench.circumstances import circumstances, commit
from paceline.distillation.model_folders import load_float32
from paceline.distillation.outputs import open_target
from paceline.distillation.student import make_student, num_parameters
from paceline.errors import ConfigError
from paceline.experiments.direct_alignment.clock import time_students
from paceline.experiments.direct_alignment.gradients import measure_noise
from paceline.experiments.direct_alignment.materials import prepare, task_files
from paceline.experiments.direct_alignment.outcome import Outcome, choose_best, tune
from paceline.experiments.direct_alignment.page import RESULTS, write_page
from paceline.experiments.direct_alignment.plan import BASELINE, PAPER, Plan, Tuned
from paceline.experiments.direct_alignment.results import SHARED, Results
from paceline.experiments.direct_alignment.teacher_costs import time_teachers
from paceline.experiments.direct_alignment.training import (
    RunContext,
    name_of,
    new_student,
    save_student,
)
from paceline.experiments.direct_alignment.workers import train_all
from paceline.experiments.prompt_files import TASKS
from paceline.verbs.distillation import measure_prices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from paceline.assembly import Pace
    from paceline.experiments.direct_alignment.materials import Materials
    from paceline.experiments.direct_alignment.plan import Budget, Run
    from paceline.experiments.findings import Findings
    from paceline.experiments.workbench import Workbench

FOLDER: Final = "direct-alignment"  # in the working folder of all experiments
_TABLES: Final = 3  # of prices


def compare_alignments(
    bench: Workbench, budget: Budget, workers: int, out: Path
) -> tuple[Findings, list[Path]]:
    """Run what is missing of a budget and write the page; return the findings and the written files.

    out: folder of the results and the figure; the page is next to it. workers: processes that train at
    the same time. bench: its `store`, if given, is a folder of the target's answers as `distill` keeps
    them in `outputs`. Raises ConfigError without the data folder, or if another process runs it.
    """
    task_files(bench.data)  # before a model is loaded
    folder = bench.folder / FOLDER
    with _locked(folder):
        pace = open_target(bench.config, None)
        materials = prepare(
            pace, bench.data, bench.store or folder / "answers", budget, bench.on_progress
        )
        results = Results(out / RESULTS, materials.name)
        context = _open(pace, materials, results, budget, folder, bench)
        comparison = _Comparison(bench, pace, context, results, Plan(budget), workers)
        comparison.train()
        comparison.measure()
        return write_page(out, budget)


class _Comparison:
    """The stages of one comparison."""

    def __init__(
        self,
        bench: Workbench,
        pace: Pace,
        context: RunContext,
        results: Results,
        plan: Plan,
        workers: int,
    ) -> None:
        self._bench, self._pace, self._context = bench, pace, context
        self._results, self._plan, self._workers = results, plan, workers
        self._saved = context.materials.save(context.folder)

    def train(self) -> None:
        """Make the runs that the results lack."""
        plan, results = self._plan, self._results
        self._train("runs: pre-training", plan.pretrainings())
        self._train("runs: learning rates", plan.sweep())
        rates = tune(plan, results)
        while True:
            # the best loss is known after this stage
            self._train("runs: losses", plan.of_losses(Tuned(rates, BASELINE)))
            if (again := tune(plan, results)) == rates:
                break
            rates = again  # a seed diverged
        tuned = Tuned(rates, choose_best(plan, results, rates))
        self._train("runs: data", plan.of_data(tuned))

    def measure(self) -> None:
        """Measure what the results lack: teachers, gradients, and students by the clock."""
        outcome = Outcome(self._plan, self._results)
        budget, context, target = self._plan.budget, self._context, self._pace.parts.target
        if self._results.of_kind("teachers") is None:
            self._results.add("teachers", time_teachers(target, context, budget.cost_tokens))
        losses = dict.fromkeys((BASELINE, PAPER, outcome.tuned.best))
        students = {loss: outcome.of_loss(loss)[0] for loss in losses}
        wanted = [kind for kind in ("gradients", "clock") if not self._results.of_kind(kind)]
        if not wanted:
            return
        self._train("runs: students", list(students.values()), with_weights=True)
        if "gradients" in wanted:
            student = load_float32(context.student(name_of(students[BASELINE])))
            found = measure_noise(target, student, context.materials.judging, budget.gradient_draws)
            self._results.add("gradients", {**found, "student": BASELINE})
        if "clock" in wanted:
            self._results.add("clock", self._clock(students))

    def _train(self, stage: str, runs: Sequence[Run], with_weights: bool = False) -> None:
        """Make the runs that are not finished. with_weights: or whose students were deleted."""
        report = partial(self._bench.on_progress, stage)
        pretrainings = {run for run in runs if run.phase == "pretrain"}

        def is_missing(run: Run) -> bool:
            needs = with_weights or run in pretrainings
            has_weights = self._context.student(name_of(run)).is_dir()
            return self._results.find(run) is None or (needs and not has_weights)

        missing = [run for run in runs if is_missing(run)]
        done = len(runs) - len(missing)
        report(done, len(runs))
        for run, facts in train_all(missing, self._context, self._saved, self._workers):
            if self._results.find(run) is None:
                self._results.add("run", facts)
            self._context.checkpoint(run).unlink(missing_ok=True)
            done += 1
            report(done, len(runs))

    def _clock(self, students: dict[Any, Run]) -> dict[str, Any]:
        """Return the speeds of these students by loss."""
        own, named = self._plan.budget, {}
        for loss, run in students.items():
            folder = self._context.student(name_of(run))
            self._pace.parts.tokenizer.save_pretrained(folder)
            named[loss] = (folder, int(self._results.of(run)["mean"]["best_length"]))
        judging = self._context.materials.judging
        chosen = [
            example
            for task in TASKS
            for example in [e for e in judging if e.domain == task][: own.clocked]
        ]
        found = time_students(
            self._bench.config, named, chosen, own.max_new_tokens, self._bench.on_progress
        )
        for loss, facts in found["students"].items():
            facts["predicted"] = self._results.of(students[loss])["mean"]["predicted_speedup"]
        return found


def _open(
    pace: Pace,
    materials: Materials,
    results: Results,
    budget: Budget,
    folder: Path,
    bench: Workbench,
) -> RunContext:
    """Return what runs need, after measuring prices and making the untrained students."""
    target = pace.parts.target
    shared = results.of_kind(SHARED)
    if shared is None:
        costs = _measure_costs(pace, materials, bench)
        shared = results.add(SHARED, _shared(pace, materials, budget, costs))
    context = RunContext(
        materials,
        folder,
        np.array(shared["round_costs"]),
        budget.validations,
        target.device.type == "cpu",
        commit(),
    )
    for run in Plan(budget).pretrainings():
        student = make_student(target, materials.settings.model_copy(update={"seed": run.seed}))
        save_student(student, context.student(new_student(run.seed)), "float32")
    return context


def _measure_costs(pace: Pace, materials: Materials, bench: Workbench) -> np.ndarray:
    """Return the costs of a student's rounds in units of a plain one [K + 1], medians of a few tables.

    One table that was measured while other work ran can make a drafted round cheaper than a plain one.
    """
    tables = [
        measure_prices(pace, materials.settings, bench.on_progress).round_costs
        for _ in range(1 if bench.sizes.smoke else _TABLES)
    ]
    # a longer draft takes no less time
    return np.maximum.accumulate(np.median(tables, axis=0))


def _shared(
    pace: Pace, materials: Materials, budget: Budget, round_costs: np.ndarray
) -> dict[str, Any]:
    target = pace.parts.target
    return {
        "budget": budget.name,
        "target": materials.target,
        "dtype": str(target.dtype).removeprefix("torch."),
        "parameter_ratio": materials.parameter_ratio,
        "num_parameters": round(materials.parameter_ratio * num_parameters(target.model)),
        "round_costs": [round(float(cost), 5) for cost in round_costs],
        "settings": materials.settings.model_dump(mode="json", exclude={"outputs"}),
        "num_answers": {task: len(own) for task, own in materials.greedy.items()},
        "judged_tasks": [example.domain for example in materials.judging],
        "judged_tokens": [example.num_output for example in materials.judging],
        "circumstances": circumstances(),
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the working folder. Raises ConfigError if another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"{folder}: another process runs this experiment there; wait for it or name another "
            "--folder"
        ) from error
    with lock:
        yield
