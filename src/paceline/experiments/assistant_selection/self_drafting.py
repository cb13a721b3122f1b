"""The target as its own drafter: sets of sub-layers to skip as arms, alone and next to other drafters.

Two sets are chosen by hand, from the middle of the stack; the third is found by `layer-search` on
prompts that no set is judged on. The question is whether a policy limits the loss where a set does not
pay, and whether a set is worth choosing where draft models and lookups are arms too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

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
from paceline.experiments.assistant_selection.searched_sets import search_set
from paceline.experiments.findings import SHARE, SPEED, Findings, Panel, Table, columns
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from paceline.experiments.findings import Column, Value
    from paceline.experiments.workbench import Workbench
    from paceline.layer_search import SearchReport
    from paceline.learning.evaluation import EvaluationReport
    from paceline.store.records import CollectedPrompt

LEARNERS: Final = ("acceptance", "policy_gradient")
FOLDER: Final = "self-drafting"
SEARCHED: Final = "searched"
DRAFT_TOKENS: Final = 4
HELD_OUT: Final = 0.5


class _Judged(NamedTuple):
    """Held-out prompts under some arms, and the ways of choosing judged on them."""

    study: Study
    report: EvaluationReport

    @property
    def policy(self) -> str:
        return self.report.policies[0]

    @property
    def forced(self) -> str:
        """The same policy, which must draft."""
        return self.report.policies[-1]


def sets_by_hand(num_layers: int) -> dict[str, LayerSubset]:
    """Return name -> middle layers to skip; the first and last layers are always kept."""
    inner = range(1, max(num_layers - 1, 2))
    sizes = {"skip-quarter": max(len(inner) // 4, 1), "skip-half": max(len(inner) // 2, 1)}
    sets = {}
    for name, size in sizes.items():
        middle = frozenset(inner[(len(inner) - size) // 2 :][:size])
        sets[name] = LayerSubset(middle, middle)
    return sets


def run(bench: Workbench) -> Findings:
    sets = sets_by_hand(bench.pace.parts.target.num_layers)
    path = bench.folder / FOLDER / "skip-set.json"
    search = search_set(bench, path, DRAFT_TOKENS)
    drafters = dict(bench.config.drafters)
    for name, by_hand in sets.items():
        skipped = {"skip_attention": sorted(by_hand.attention), "skip_mlp": sorted(by_hand.mlp)}
        drafters[name] = _layer_skip(**skipped)
    sets[SEARCHED] = search.best.subset
    drafters[SEARCHED] = _layer_skip(skip_set=str(path))
    within = bench.with_drafters(FOLDER, drafters)
    prompts = within.collection.prompts
    alone = _judge(within, prompts, sets)
    among = _judge(within, prompts, drafters)
    groups = {f"sets and `{NONE}`": alone, "all drafters": among}
    return Findings(
        tables=[_ways_table(groups, sets), _sets_table(alone, among, sets, search)],
        panels=[_panel(alone, sets), _ways_panel(groups)],
        settings=within.settings() | {"held-out prompts": alone.report.overall.num_prompts},
        remarks=_remarks(alone, among, sets, search),
        facts={
            "reports": {name: judged.report for name, judged in groups.items()},
            "sets": {
                name: {"attention": sorted(subset.attention), "mlp": sorted(subset.mlp)}
                for name, subset in sets.items()
            },
            "trials of the search": search.trials,
        },
    )


def _layer_skip(**skipped: object) -> DrafterSection:
    settings = {**skipped, "num_draft_tokens": DRAFT_TOKENS}
    return DrafterSection(kind="layer_skip", settings=settings)


def _judge(bench: Workbench, prompts: list[CollectedPrompt], drafters: Collection[str]) -> _Judged:
    study = Study.of(bench, prompts, bench.arms(list(drafters)), held_out=HELD_OUT)
    contenders = study.contenders(LEARNERS)
    contenders += [always_drafting(contenders[0], study.held_out)]
    return _Judged(study, study.report(contenders))


def _share_of(report: EvaluationReport, way: str, drafters: Collection[str]) -> float:
    return sum(share(report, way, name) for name in drafters)


def _ways_table(groups: Mapping[str, _Judged], sets: Collection[str]) -> Table:
    heads: list[Column] = []
    rows: list[list[Value]] = []
    for group, (_, report) in groups.items():
        ways = [RANDOM, BEST_SINGLE, PER_TASK, *report.policies, ORACLE]
        heads, of_group = ways_table(report, ways)
        rows += [
            [group, row[0], share(report, way, NONE), _share_of(report, way, sets), *row[1:]]
            for way, row in zip(ways, of_group, strict=True)
        ]
    heads[1:1] = columns((f"to `{NONE}`", SHARE), ("to a set", SHARE))
    explanation = (
        f"The target drafts for itself without some of its sub-layers, up to {DRAFT_TOKENS} tokens with "
        "the published adaptive exit: the sets alone, and together with the configuration's other "
        f"drafters. The last policy of each group must draft. {PREDICTED}"
    )
    return Table("Self-drafting: ways of choosing", explanation, [*columns("arms"), *heads], rows)


def _sets_table(
    alone: _Judged,
    among: _Judged,
    sets: Mapping[str, LayerSubset],
    search: SearchReport,
) -> Table:
    report, held_out = alone.report, alone.study.held_out
    heads = columns("set", "attention skipped", "MLP skipped", ("tokens per round", "{:.2f}"))
    heads += columns("speed-up when always used")
    heads += columns(*((task, SPEED) for task in report.by_domain))
    heads += columns(("chosen among the sets", SHARE), ("among all drafters", SHARE))
    rows: list[list[Value]] = []
    for name, subset in sets.items():
        rounds = held_out.rounds_per_token[:, held_out.arms.index(name)].mean()
        row: list[Value] = [name, _layers(subset.attention), _layers(subset.mlp)]
        row += [float(1.0 / rounds), interval(report.overall.arms[name].speedup)]
        row += [part.arms[name].speedup.value for part in report.by_domain.values()]
        row += [share(judged.report, judged.policy, name) for judged in (alone, among)]
        rows.append(row)
    explanation = (
        f"Each set used for all requests, overall and by task. The search tried {len(search.trials)} "
        "sets on prompts that are not judged on."
    )
    return Table("The sets", explanation, heads, rows)


def _layers(layers: Collection[int]) -> str:
    return " ".join(map(str, sorted(layers))) or "none"


def _panel(alone: _Judged, sets: Collection[str]) -> Panel:
    found = [alone.report.overall.arms[name].speedup for name in sets]
    labels = [name.replace("-", "-\n", 1) for name in sets]
    return speed_panel("each set, always used", [interval_series("all tasks", labels, found)])


def _ways_panel(groups: Mapping[str, _Judged]) -> Panel:
    series = []
    for group, (_, report) in groups.items():
        ways = [BEST_SINGLE, *report.policies, ORACLE]
        labels = [way.replace(", ", ",\n").replace("_", "_\n") for way in ways]
        found = [report.overall.strategies[way].speedup for way in ways]
        series.append(interval_series(group.replace("`", ""), labels, found))
    return speed_panel("ways of choosing", series)


def _remarks(
    alone: _Judged, among: _Judged, sets: Mapping[str, LayerSubset], search: SearchReport
) -> list[str]:
    report = alone.report
    speeds = {name: report.overall.arms[name].speedup.value for name in sets}
    by_hand = {name: speed for name, speed in speeds.items() if name != SEARCHED}
    slowest = report.slowest[alone.policy]
    listed = ", ".join(f"{speed:.2f}x (`{name}`)" for name, speed in by_hand.items())
    return [
        f"Used for all requests, the searched set reaches {speeds[SEARCHED]:.2f}x "
        f"({search.speedup(search.best):.2f}x on the prompts of the search); those chosen by hand reach "
        f"{listed}.",
        f"Among the sets and `{NONE}`, the policy reaches {speedup(report, alone.policy):.2f}x and "
        f"chooses `{NONE}` for {share(report, alone.policy, NONE):.0%}; its slowest task is "
        f"{slowest.task}, {interval(slowest.speedup)}. Without `{NONE}` it reaches "
        f"{speedup(report, alone.forced):.2f}x, the oracle {speedup(report, ORACLE):.2f}x.",
        f"Next to the other drafters, the policy reaches {speedup(among.report, among.policy):.2f}x and "
        f"chooses a set for {_share_of(among.report, among.policy, sets):.0%}, the oracle for "
        f"{_share_of(among.report, ORACLE, sets):.0%} of the prompts.",
    ]
