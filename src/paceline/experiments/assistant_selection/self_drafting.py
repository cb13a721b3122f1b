"""The target as its own drafter: several sets of sub-layers to skip, and `none`, as arms.

The sets are chosen by hand, from few to most sub-layers, for a target of any depth; no set was searched
for. The question is whether a policy limits the loss where a set does not pay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.config import DrafterSection
from paceline.contracts import NONE
from paceline.experiments.assistant_selection.learned import (
    BEST_SINGLE,
    ORACLE,
    PER_TASK,
    PREDICTED,
    RANDOM,
    Study,
    always_drafting,
    interval,
    interval_series,
    share,
    speed_panel,
    speedup,
    ways_table,
)
from paceline.experiments.findings import SHARE, SPEED, Findings, Panel, Table, columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench
    from paceline.learning.evaluation import EvaluationReport

LEARNERS: Final = ("acceptance", "policy_gradient")
FOLDER: Final = "self-drafting"
MOST_PROMPTS: Final = 40  # per task: every set drafts from every position of every text
DRAFT_TOKENS: Final = 4


def skip_sets(num_layers: int) -> dict[str, tuple[list[int], list[int]]]:
    """Return name -> (attention, MLP) sub-layers to skip; the first and last layers are always kept."""
    inner = range(1, max(num_layers - 1, 2))
    quarter, half = max(len(inner) // 4, 1), max(len(inner) // 2, 1)
    middle = list(inner)[(len(inner) - half) // 2 :][:half]
    central = list(inner)[(len(inner) - quarter) // 2 :][:quarter]
    return {
        "skip-quarter": (central, central),
        "skip-attention": (middle, []),
        "skip-alternate": (list(inner[::2]), list(inner[::2])),
        "skip-half": (middle, middle),
        "skip-most": (list(inner), list(inner)),
    }


def run(bench: Workbench) -> Findings:
    sets = skip_sets(bench.pace.parts.target.model.config.num_hidden_layers)
    drafters = {
        name: DrafterSection(
            kind="layer_skip",
            settings={
                "skip_attention": attention,
                "skip_mlp": mlp,
                "num_draft_tokens": DRAFT_TOKENS,
            },
        )
        for name, (attention, mlp) in sets.items()
    }
    within = bench.with_drafters(FOLDER, drafters, MOST_PROMPTS)
    study = Study.of(within, within.collection.prompts, within.arms(list(drafters)))
    contenders = study.contenders(LEARNERS)
    contenders += [always_drafting(contenders[0], study.held_out)]
    report = study.report(contenders)
    return Findings(
        tables=[_ways_table(report), _sets_table(report, sets, study)],
        panels=[_panel(report)],
        settings=within.settings(),
        remarks=_remarks(report),
        facts={"report": report, "sets": sets},
    )


def _ways_table(report: EvaluationReport) -> Table:
    ways = [RANDOM, BEST_SINGLE, PER_TASK, *report.policies, ORACLE]
    heads, rows = ways_table(report, ways)
    heads[1:1] = columns((f"to `{NONE}`", SHARE))
    rows = [
        [row[0], share(report, way, NONE), *row[1:]] for way, row in zip(ways, rows, strict=True)
    ]
    explanation = (
        f"The target drafts for itself without some of its sub-layers, up to {DRAFT_TOKENS} tokens with "
        "the published adaptive exit; the last policy must draft. "
        f"{PREDICTED}"
    )
    return Table("Self-drafting: ways of choosing", explanation, heads, rows)


def _sets_table(
    report: EvaluationReport, sets: Mapping[str, tuple[list[int], list[int]]], study: Study
) -> Table:
    heads = columns("set", "attention skipped", "MLP skipped", ("tokens per round", "{:.2f}"))
    heads += columns(("chosen by the policy", SHARE), "speed-up when always used")
    heads += columns(*((task, SPEED) for task in report.by_domain))
    rows: list[list[Value]] = []
    held_out = study.held_out
    for name, (attention, mlp) in sets.items():
        rounds = held_out.rounds_per_token[:, held_out.arms.index(name)].mean()
        row: list[Value] = [name, len(attention), len(mlp), float(1.0 / rounds)]
        row += [share(report, report.policies[0], name)]
        row += [interval(report.overall.arms[name].speedup)]
        row += [part.arms[name].speedup.value for part in report.by_domain.values()]
        rows.append(row)
    explanation = "Each set used for all requests, overall and by task."
    return Table("The sets", explanation, heads, rows)


def _panel(report: EvaluationReport) -> Panel:
    arms = [arm for arm in report.overall.arms if arm != NONE]
    names = [*arms, BEST_SINGLE, *report.policies, ORACLE]
    found = [report.overall.arms[arm].speedup for arm in arms]
    found += [report.overall.strategies[way].speedup for way in names[len(arms) :]]
    labels = [name.replace(", ", ",\n") for name in names]
    return speed_panel("sets and ways of choosing", [interval_series("all tasks", labels, found)])


def _remarks(report: EvaluationReport) -> list[str]:
    policy, forced = report.policies[0], report.policies[-1]
    sets = {arm: f.speedup.value for arm, f in report.overall.arms.items() if arm != NONE}
    best, worst = max(sets, key=lambda a: sets[a]), min(sets, key=lambda a: sets[a])
    slowest = report.slowest[policy]
    return [
        f"Used for all requests, the sets reach {sets[worst]:.2f}x (`{worst}`) to {sets[best]:.2f}x "
        f"(`{best}`).",
        f"The policy reaches {speedup(report, policy):.2f}x and chooses `{NONE}` for "
        f"{share(report, policy, NONE):.0%}; its slowest task is {slowest.task}, "
        f"{interval(slowest.speedup)}. Without `{NONE}` it would reach {speedup(report, forced):.2f}x.",
        f"The oracle over these sets and `{NONE}` reaches {speedup(report, ORACLE):.2f}x.",
    ]
