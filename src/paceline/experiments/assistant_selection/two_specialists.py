"""Choice between two specialists by a policy that is told no task: two drafters, two tasks, by pairs.

A specialist is a drafter of the configuration that is named after a task. The name selects the prompts
and labels the table; nothing else here knows tasks.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final

from paceline.contracts import NONE
from paceline.errors import ConfigError
from paceline.experiments.assistant_selection.learned import (
    BEST_SINGLE,
    FIRST_LINE,
    ORACLE,
    PER_TASK,
    PREDICTED,
    RANDOM,
    Study,
    interval,
    of_tasks,
    share,
    speed_panel,
    speedup,
    tasks_of,
)
from paceline.experiments.findings import SHARE, SPEED, Findings, Panel, Series, Table, columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench
    from paceline.learning.evaluation import EvaluationReport

PAIR: Final = ("translation", "math")
LEARNERS: Final = ("acceptance", "policy_gradient", "reinforce", "knn")
BASELINES: Final = (RANDOM, BEST_SINGLE, FIRST_LINE, PER_TASK)


def run(bench: Workbench) -> Findings:
    prompts = bench.collection.prompts
    tasks = tasks_of(prompts)
    specialists = [name for name in bench.config.drafters if name in tasks]
    if len(specialists) < 2:
        raise ConfigError(
            "this experiment needs two drafters that are named after tasks of the prompts, such as "
            f"'{PAIR[0]}' and '{PAIR[1]}'"
        )
    pair = PAIR if set(PAIR) <= set(specialists) else (specialists[0], specialists[1])
    report = _pair_report(bench, pair, LEARNERS)
    every = {pair: report}
    for two in combinations(specialists, 2):
        if set(two) != {*pair}:
            every[two] = _pair_report(bench, two, LEARNERS[:1])
    return Findings(
        tables=[_ways_table(report, pair), _pairs_table(every)],
        panels=[_shares_panel(report, pair), _pairs_panel(every)],
        settings=bench.settings(),
        remarks=_remarks(report, pair, every),
        facts={"reports": {" + ".join(two): one for two, one in every.items()}},
    )


def _pair_report(
    bench: Workbench, pair: tuple[str, str], learners: Sequence[str]
) -> EvaluationReport:
    study = Study.of(bench, of_tasks(bench.collection.prompts, pair), bench.arms(pair))
    return study.report(study.contenders(learners))


def _ways_table(report: EvaluationReport, pair: Sequence[str]) -> Table:
    heads = columns("chosen by", *((f"{task} prompts to `{task}`", SHARE) for task in pair))
    heads += columns((f"to `{NONE}`", SHARE), "speed-up over none", ("of the oracle", "{:.1%}"))
    rows: list[list[Value]] = []
    for drafter in pair:
        alone = next(
            figures
            for arm, figures in report.overall.arms.items()
            if arm.partition("@")[0] == drafter
        )
        to: list[Value] = [1.0 if task == drafter else 0.0 for task in pair]
        rows.append([f"always `{drafter}`", *to, 0.0, interval(alone.speedup), alone.of_oracle])
    for way in (*BASELINES, *report.policies, ORACLE):
        if way not in report.slowest:
            continue
        figures = report.overall.strategies[way]
        own: list[Value] = [share(report, way, task, task) for task in pair]
        own += [share(report, way, NONE), interval(figures.speedup), figures.of_oracle]
        rows.append([way, *own])
    explanation = (
        f"{report.overall.num_prompts} held-out prompts of {pair[0]} and {pair[1]}, and a drafter "
        "trained on each, at every draft length. `always` is one drafter at its best length in "
        f"training; random is the mean over all arms. {PREDICTED}"
    )
    return Table(f"Two specialists: {pair[0]} and {pair[1]}", explanation, heads, rows)


def _pairs_table(every: dict[tuple[str, str], EvaluationReport]) -> Table:
    heads = columns("tasks", "prompts", ("first to its own", SHARE), ("second to its own", SHARE))
    heads += columns(*((way, SPEED) for way in ("best single", "per task", "policy", "oracle")))
    rows: list[list[Value]] = []
    for pair, report in every.items():
        policy = report.policies[0]
        row: list[Value] = [" + ".join(pair), report.overall.num_prompts]
        row += [share(report, policy, task, task) for task in pair]
        row += [speedup(report, way) for way in (BEST_SINGLE, PER_TASK, policy, ORACLE)]
        rows.append(row)
    explanation = (
        f"Every pair of specialists on the held-out prompts of their tasks; the policy is "
        f"`{LEARNERS[0]}`. Where a share is below 100%, the other drafter or `{NONE}` may be faster for "
        "the other prompts; the oracle's column is the possible gain."
    )
    return Table("All pairs", explanation, heads, rows)


def _shares_panel(report: EvaluationReport, pair: Sequence[str]) -> Panel:
    ways = [*report.policies, ORACLE]
    names = [way.replace("_", "\n") for way in ways]
    series = [
        Series(f"{task} prompts to {task}", names, [share(report, w, task, task) for w in ways])
        for task in pair
    ]
    return Panel(
        "prompts that get their specialist", "share of held-out prompts", series, kind="bars"
    )


def _pairs_panel(every: dict[tuple[str, str], EvaluationReport]) -> Panel:
    names = ["\n".join(pair) for pair in every]
    ways = {BEST_SINGLE: BEST_SINGLE, PER_TASK: PER_TASK, "policy": "", ORACLE: ORACLE}
    series = [
        Series(label, names, [speedup(r, way or r.policies[0]) for r in every.values()])
        for label, way in ways.items()
    ]
    return speed_panel("all pairs", series)


def _remarks(
    report: EvaluationReport,
    pair: Sequence[str],
    every: dict[tuple[str, str], EvaluationReport],
) -> list[str]:
    policy = report.policies[0]
    found = ", ".join(f"{share(report, policy, task, task):.0%} of {task}" for task in pair)
    over = report.over[policy][BEST_SINGLE]
    gains = [speedup(one, one.policies[0]) / speedup(one, BEST_SINGLE) for one in every.values()]
    remarks = [
        f"`{policy}`, told no task, gives {found} prompts to the specialist and is "
        f"{interval(over)} as fast as the best single arm.",
        f"Over all {len(every)} pairs it is {min(gains):.2f}x to {max(gains):.2f}x the best single "
        "arm.",
    ]
    if FIRST_LINE in report.over[policy]:
        line = report.over[policy][FIRST_LINE]
        remarks.append(
            "A table of first lines also chooses well here, because every task has a fixed instruction: "
            f"`{policy}` is {interval(line)} as fast as that."
        )
    return remarks
