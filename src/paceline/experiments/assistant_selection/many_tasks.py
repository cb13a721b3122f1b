"""Many tasks, and drafters that were made for none of them: the first turns of Spec-Bench's questions.

Every category is left out once: the policy that chooses for it is learned from the others.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from paceline.contracts import NONE
from paceline.errors import ConfigError
from paceline.experiments.assistant_selection.learned import (
    BEST_SINGLE,
    ORACLE,
    PREDICTED,
    RANDOM,
    Study,
    interval,
    interval_series,
    share,
    speed_panel,
    speedup,
    ways_table,
)
from paceline.experiments.findings import SHARE, SPEED, Findings, Panel, Table, columns
from paceline.experiments.prompt_files import TASKS
from paceline.learning.dataset import build_dataset
from paceline.learning.evaluation import Evaluator, train_contenders

if TYPE_CHECKING:
    from paceline.config import LearningSection
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench
    from paceline.learning.evaluation import EvaluationReport
    from paceline.store.records import CollectedPrompt

LEARNER: Final = "acceptance"
OTHERS: Final = ("policy_gradient", "knn")  # on the mixed held-out prompts
STORE: Final = "spec-bench"
SLOWEST: Final = 0.98


def run(bench: Workbench) -> Findings:
    questions = bench.spec_bench
    prompts = bench.collect(questions, bench.folder / STORE).prompts
    generalists = [name for name in bench.config.drafters if name not in TASKS]
    if not generalists:
        raise ConfigError(
            f"this experiment needs drafters that are not named {', '.join(TASKS)}; configure `general` "
            "and a lookup"
        )
    arms = bench.arms(generalists)
    study = Study.of(bench, prompts, arms)
    mixed = study.report(study.contenders([LEARNER, *OTHERS]))
    unseen = _left_out(bench, study.settings, prompts, arms)
    return Findings(
        tables=[_categories_table(unseen), _mixed_table(mixed)],
        panels=[_panel(unseen)],
        settings=bench.settings(prompts)
        | {"questions that fit": f"{len(prompts)}/{len(questions)}"},
        remarks=_remarks(unseen, mixed, len(questions) - len(prompts)),
        facts={"mixed": mixed, "left out": unseen},
    )


def _left_out(
    bench: Workbench,
    settings: LearningSection,
    prompts: list[CollectedPrompt],
    arms: list[str],
) -> dict[str, EvaluationReport]:
    data, _ = build_dataset(bench.priced(prompts), arms, bench.costs, settings)
    sections = Evaluator(data, bench.decode, settings.seed).left_out(
        data, lambda part: train_contenders(part, [LEARNER], [None], settings, 1, bench.on_progress)
    )
    return {section.task: section.report for section in sections}


def _categories_table(unseen: dict[str, EvaluationReport]) -> Table:
    heads = columns("category, left out", "prompts", (f"to `{NONE}`", SHARE), "mostly to")
    heads += columns(("random", SPEED), ("best single elsewhere", SPEED), "policy")
    heads += columns(("oracle", SPEED))
    rows: list[list[Value]] = []
    for task, report in unseen.items():
        figures = report.overall.strategies
        drafters = report.overall.chosen[LEARNER].drafters
        row: list[Value] = [task, report.overall.num_prompts, share(report, LEARNER, NONE)]
        row += [max(drafters, key=lambda name: drafters[name])]
        row += [figures[RANDOM].speedup.value, figures[BEST_SINGLE].speedup.value]
        rows.append([*row, interval(figures[LEARNER].speedup), figures[ORACLE].speedup.value])
    explanation = (
        f"For each category's prompts, `{LEARNER}` learned from all other categories chooses; best "
        f"single is the best arm of those categories. {PREDICTED}"
    )
    return Table("Categories never seen in training", explanation, heads, rows)


def _mixed_table(mixed: EvaluationReport) -> Table:
    ways = [RANDOM, BEST_SINGLE, "per task", *mixed.policies, ORACLE]
    heads, rows = ways_table(mixed, ways)
    explanation = (
        f"{mixed.overall.num_prompts} held-out prompts of all categories; the policies are learned from "
        f"{mixed.num_train} others. These are few for {len(mixed.by_domain)} categories, so intervals "
        "are wide."
    )
    return Table("All categories mixed", explanation, heads, rows)


def _panel(unseen: dict[str, EvaluationReport]) -> Panel:
    names = [task.replace("_", "\n") for task in unseen]
    ways = {"best single elsewhere": BEST_SINGLE, "policy": LEARNER, "oracle": ORACLE}
    series = []
    for label, way in ways.items():
        speeds = [report.overall.strategies[way].speedup for report in unseen.values()]
        series.append(interval_series(label, names, speeds))
    return speed_panel("categories never seen", series)


def _remarks(
    unseen: dict[str, EvaluationReport], mixed: EvaluationReport, num_too_long: int
) -> list[str]:
    speeds = {task: speedup(report, LEARNER) for task, report in unseen.items()}
    slow = {task: speed for task, speed in speeds.items() if speed < SLOWEST}
    worst = min(speeds, key=lambda task: speeds[task])
    better = sum(speeds[task] > speedup(report, BEST_SINGLE) for task, report in unseen.items())
    most = Counter(
        max(drafters, key=lambda name: drafters[name])
        for report in unseen.values()
        for drafters in (report.overall.chosen[LEARNER].drafters,)
    )
    over = mixed.over[LEARNER][BEST_SINGLE]
    return [
        f"Left out, {len(slow)} of {len(speeds)} categories fall below {SLOWEST} of plain decoding; "
        f"the slowest is {worst} at {speeds[worst]:.2f}x.",
        f"`{LEARNER}` is faster than the other categories' best arm in {better} of {len(speeds)}; "
        f"mixed, it is {interval(over)} as fast as the best single arm.",
        "Most frequent drafter of an unseen category: "
        + ", ".join(f"`{name}` {count}" for name, count in most.most_common())
        + ".",
        f"{num_too_long} questions do not fit the target's context and are left out.",
    ]
