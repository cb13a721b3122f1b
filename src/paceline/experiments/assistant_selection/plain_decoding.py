"""Value of the arm `none`: with useful drafters, with those of other domains, with a useless one.

The same policy decides with and without that arm. The useless drafter is `general` with its token
embeddings shuffled: its cost is unchanged and its drafts are wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.config import DrafterSection
from paceline.contracts import NONE
from paceline.experiments.assistant_selection.learned import (
    BEST_SINGLE,
    ORACLE,
    PREDICTED,
    Study,
    always_drafting,
    interval,
    interval_series,
    of_tasks,
    share,
    speed_panel,
    speedup,
    tasks_of,
)
from paceline.experiments.findings import SHARE, Findings, Panel, Table, columns

if TYPE_CHECKING:
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench
    from paceline.learning.evaluation import EvaluationReport

LEARNER: Final = "acceptance"
USELESS: Final = "shuffled"
_SHUFFLED: Final = "general"  # whose weights are shuffled
_MISMATCHED: Final = (("translation", "math"), ("code", "summary"))  # tasks, and their drafters
_FEW: Final = 50  # prompts per task for the useless drafter, which needs no more
SLOWEST: Final = 0.98


def run(bench: Workbench) -> Findings:
    prompts = bench.collection.prompts
    studies = {"all drafters": Study.of(bench, prompts, bench.arms(list(bench.config.drafters)))}
    collected_tasks = set(tasks_of(prompts))
    for tasks, drafters in (_MISMATCHED, _MISMATCHED[::-1]):
        if set(tasks) | set(drafters) <= collected_tasks:
            name = f"{' and '.join(drafters)} drafting for {' and '.join(tasks)}"
            studies[name] = Study.of(bench, of_tasks(prompts, tasks), bench.arms(drafters))
    useless = _with_useless(bench)
    few = useless.collection.prompts
    studies["a useless drafter"] = Study.of(useless, few, useless.arms([USELESS]))
    reports = {}
    for name, study in studies.items():
        contenders = study.contenders([LEARNER])
        contenders += [always_drafting(one, study.held_out) for one in contenders]
        reports[name] = study.report(contenders)
    return Findings(
        tables=[_table(reports), _tasks_table(reports)],
        panels=[_panel(reports)],
        settings=bench.settings(),
        remarks=_remarks(reports),
        facts={"reports": reports},
    )


def _with_useless(bench: Workbench) -> Workbench:
    """Return a workbench whose only drafter has shuffled embeddings."""
    bench.arms([_SHUFFLED])  # raises if it is not configured
    section = bench.config.drafters[_SHUFFLED]
    folder = bench.folder / USELESS / "model"
    if not (folder / "config.json").is_file():
        shuffle_embeddings(Path(str(section.settings["model"])), folder)
    settings = section.settings | {"model": str(folder)}
    drafters = {USELESS: DrafterSection(kind=section.kind, settings=settings)}
    return bench.with_drafters(USELESS, drafters, _FEW)


def shuffle_embeddings(model: Path, folder: Path, seed: int = 0) -> None:
    """Write a model with its token embeddings permuted: as large and as fast as before."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    embedding = loaded.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    weight = embedding.weight
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.copy_(weight[order].clone())
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    loaded.save_pretrained(folder)


def _both(report: EvaluationReport) -> tuple[str, str]:
    """Return the names of the policy with `none` among its arms, and of the same without it."""
    with_none, without = report.policies
    return with_none, without


def _table(reports: dict[str, EvaluationReport]) -> Table:
    heads = columns("drafters", "prompts", (f"to `{NONE}`", SHARE), "policy", "its slowest task")
    heads += columns(f"policy, no `{NONE}`", "its slowest task, then", "best single", "oracle")
    rows: list[list[Value]] = []
    for name, report in reports.items():
        row: list[Value] = [name, report.overall.num_prompts, share(report, _both(report)[0], NONE)]
        for policy in _both(report):
            slowest = report.slowest[policy]
            row.append(interval(report.overall.strategies[policy].speedup))
            row.append(f"{slowest.task} {interval(slowest.speedup)}")
        row += [interval(report.overall.strategies[way].speedup) for way in (BEST_SINGLE, ORACLE)]
        rows.append(row)
    explanation = (
        f"`{LEARNER}` with `{NONE}` among the arms, and the same policy when it must draft. Best "
        f"single and oracle may choose `{NONE}`. {PREDICTED}"
    )
    return Table("Plain decoding as an arm", explanation, heads, rows)


def _tasks_table(reports: dict[str, EvaluationReport]) -> Table:
    heads = columns("drafters", "task", (f"to `{NONE}`", SHARE), "policy", f"policy, no `{NONE}`")
    rows: list[list[Value]] = []
    for name, report in reports.items():
        for task, part in report.by_domain.items():
            row: list[Value] = [name, task, share(report, _both(report)[0], NONE, task)]
            row += [interval(part.strategies[policy].speedup) for policy in _both(report)]
            rows.append(row)
    return Table("By task", "The same, task by task.", heads, rows)


def _panel(reports: dict[str, EvaluationReport]) -> Panel:
    names = [name.replace(" drafting for ", "\nfor ") for name in reports]
    series = []
    for label, which in ((f"with {NONE}", 0), (f"without {NONE}", 1)):
        slowest = [r.slowest[_both(r)[which]].speedup for r in reports.values()]
        series.append(interval_series(f"slowest task, {label}", names, slowest))
    return speed_panel("the slowest task", series)


def _remarks(reports: dict[str, EvaluationReport]) -> list[str]:
    slow = [
        f"{name} ({report.slowest[policy].task} {interval(report.slowest[policy].speedup)})"
        for name, report in reports.items()
        for policy in _both(report)[:1]
        if report.slowest[policy].speedup.value < SLOWEST
    ]
    kept = "nowhere is a task below" if not slow else "a task falls below"
    tail = f": {'; '.join(slow)}" if slow else ""
    remarks = [f"With `{NONE}` among the arms {kept} {SLOWEST} of plain decoding{tail}."]
    for name, report in reports.items():
        with_none, without = _both(report)
        remarks.append(
            f"{name[:1].upper()}{name[1:]}: {speedup(report, with_none):.2f}x with `{NONE}`, chosen "
            f"for {share(report, with_none, NONE):.0%}; {speedup(report, without):.2f}x without it."
        )
    return remarks
