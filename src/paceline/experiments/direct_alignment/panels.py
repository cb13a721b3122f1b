"""The figure of a finished comparison: losses, a task left out, number of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.distillation.comparison import MEAN
from paceline.experiments.direct_alignment.outcome import LONGEST
from paceline.experiments.direct_alignment.plan import BASELINE, compared_without_task
from paceline.experiments.findings import Panel, Series
from paceline.experiments.prompt_files import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.experiments.direct_alignment.outcome import Outcome
    from paceline.intervals import Interval


def panels(outcome: Outcome) -> list[Panel]:
    """Return the figure: the losses, a task left out, the number of answers."""
    return [_losses_panel(outcome), _left_out_panel(outcome), _numbers_panel(outcome)]


def _losses_panel(outcome: Outcome) -> Panel:
    base = outcome.of_loss(BASELINE)
    losses = [loss for loss in outcome.plan.budget.losses if loss != BASELINE]
    rises = [outcome.rise(base, outcome.of_loss(loss))[MEAN] for loss in losses]
    names = [loss.replace("_", "\n") for loss in losses]
    tau, acceptance = outcome.tau(base), outcome.mean(base, "mean", "acceptance")
    greedy = [own.block_efficiency for own in rises]
    sampled = [own.acceptance for own in rises if own.acceptance is not None]  # all have one
    series = [
        _in_percent(f"tau on greedy answers, K = {LONGEST}", names, greedy, tau),
        _in_percent("acceptance under sampling", names, sampled, acceptance),
    ]
    return Panel(
        f"losses: rise over {BASELINE.replace('_', '-')}, mean over tasks",
        "%",
        series,
        kind="bars",
        baseline=0.0,
    )


def _in_percent(label: str, names: Sequence[str], rises: Sequence[Interval], of: float) -> Series:
    """Return rises in percent of a figure."""
    low, value, high = (
        [100 * bound / of for bound in bounds]
        for bounds in zip(*((own.low, own.value, own.high) for own in rises), strict=True)
    )
    return Series(label, list(names), value, low, high)


def _left_out_panel(outcome: Outcome) -> Panel:
    plan, tuned = outcome.plan, outcome.tuned
    loss = compared_without_task(tuned)[0]
    every = [plan.without_task(tuned, loss, None, seed) for seed in plan.seeds]
    before = [plan.pretrained(seed) for seed in plan.seeds]
    others = [[plan.without_task(tuned, loss, task, seed) for seed in plan.seeds] for task in TASKS]
    names = list(TASKS)
    series = [
        Series("pre-trained only", names, [outcome.tau(before, task) for task in TASKS]),
        Series(
            "then three other tasks",
            names,
            [outcome.tau(runs, task) for runs, task in zip(others, TASKS, strict=True)],
        ),
        Series("then all four tasks", names, [outcome.tau(every, task) for task in TASKS]),
    ]
    return Panel(
        f"task left out, {loss}",
        f"tokens per target forward, K = {LONGEST}",
        series,
        kind="bars",
        baseline=1.0,
    )


def _numbers_panel(outcome: Outcome) -> Panel:
    plan, tuned = outcome.plan, outcome.tuned
    runs = [
        [plan.with_answers(tuned, num, seed) for seed in plan.seeds] for num in plan.budget.answers
    ]
    x = [outcome.mean(own, "num_answers") for own in runs]
    series = [Series(task, x, [outcome.tau(own, task) for own in runs]) for task in (*TASKS, MEAN)]
    return Panel(
        f"number of answers, {tuned.best}, equally many tokens",
        f"tokens per target forward, K = {LONGEST}",
        series,
        x_label="answers",
        log_x=True,
    )
