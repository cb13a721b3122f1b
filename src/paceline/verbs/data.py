"""`paceline data` as a function: the rows, tasks and acceptance of a collection, and the fastest arms.

Acceptance is counted along the target's texts and knows no costs. The fastest arms are predicted with
this machine's cost table where there is one. Symbols: N rows, A arms.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from paceline.contracts import NONE, split_arm
from paceline.costs.table import CostTable
from paceline.drafting.catalog import arms_of
from paceline.errors import ArtefactError
from paceline.learning.rounds import round_table
from paceline.plotting import import_figure
from paceline.replay import price_rounds, rounds_of, stored_drafters, with_cascades
from paceline.store.collection import load_collection, read_overlaps
from paceline.store.records import sampling_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from paceline.config import Config
    from paceline.store.records import CollectedPrompt

ALL = "all"


@dataclass(frozen=True, slots=True)
class TaskData:
    """The rows of one task."""

    num_rows: int
    num_prompts: int
    samplings: dict[str, int]  # number of rows by sampling, `greedy` or `t0.8,p0.95`
    prompt_tokens: int  # median
    output_tokens: int  # median
    total_output_tokens: int


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One drafter, at its configured length, on the rows of one task."""

    match: float | None  # share of drafts whose first token is accepted; None without a draft
    drafting: float  # share of rounds with a draft
    tokens_per_round: float  # emitted, the target's own token included
    overlap: float | None = None  # mean sum of min(p, q) over the scored tokens of the outputs


@dataclass(frozen=True, slots=True)
class Oracle:
    """The arm with the fewest predicted seconds on each row of one task."""

    shares: dict[str, float]  # arm -> share of rows, of arms with any row
    speedup: float  # seconds of all rows under `none` over those under each row's fastest arm


@dataclass(slots=True)
class DataReport:
    """The figures of a collection, by task; the last task is `all`."""

    tasks: dict[str, TaskData]
    acceptance: dict[str, dict[str, Acceptance]]  # drafter -> task -> figures
    oracle: dict[str, Oracle]  # by task; empty without a cost table
    writers: dict[str, int]  # model with outputs of its own -> number of rows with one
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def data(config: Config) -> DataReport:
    """Describe the configuration's collection, priced with its cost table where there is one.

    Raises StoreError if there is no collection.
    """
    collection = load_collection(config.paths.store, encoders=())
    collected = {name: line for name, line in collection.identity.arms.items() if name != NONE}
    missing = [name for name in stored_drafters(config) if name not in collected]
    notes = [
        f"'{name}' is configured and not in the collection; `paceline collect PROMPTS` adds it"
        for name in missing
    ]
    if not missing:
        collected = with_cascades(collected, config)
    arms = [arm for arm in arms_of(config) if split_arm(arm)[0] in {NONE, *collected}]
    costs, prompts = None, collection.prompts
    try:
        costs = CostTable.load(config.paths.costs)
        # a drafter that is no longer configured has no price
        priced = {name: line for name, line in collected.items() if name in config.drafters}
        costs.check(priced, priced)
        if not missing:
            prompts = price_rounds(prompts, config, costs)
    except ArtefactError as error:
        costs = None
        notes.append(f"the fastest drafters are not known: {error}")
    report = summarise(prompts, arms, costs, read_overlaps(config.paths.store))
    report.notes.extend(notes)
    return report


def summarise(
    prompts: Sequence[CollectedPrompt],
    arms: Sequence[str],
    costs: CostTable | None,
    overlaps: Mapping[str, Mapping[str, np.ndarray]] = MappingProxyType({}),
) -> DataReport:
    """Return a report of collected prompts.

    arms: the arms that the oracle chooses among. costs: None leaves the oracle out. overlaps: drafter
    -> id of a row -> sums of min(p, q), where the collection has them.
    """
    by_task: dict[str, list[CollectedPrompt]] = {}
    for prompt in sorted(prompts, key=lambda p: p.domain):
        by_task.setdefault(prompt.domain, []).append(prompt)
    by_task[ALL] = list(prompts)
    drafters = [name for name in prompts[0].replays if name != NONE]
    return DataReport(
        tasks={task: _task(rows) for task, rows in by_task.items()},
        acceptance={
            name: {
                task: _acceptance(rows, name, overlaps.get(name, {}))
                for task, rows in by_task.items()
            }
            for name in drafters
        },
        oracle=_oracles(prompts, by_task, arms, costs) if costs is not None else {},
        writers=dict(sorted(Counter(name for p in prompts for name in p.draft_outputs).items())),
    )


def _task(rows: Sequence[CollectedPrompt]) -> TaskData:
    samplings = Counter(sampling_label(p.sampling).removeprefix("@") or "greedy" for p in rows)
    outputs = [len(p.output_tokens) for p in rows]
    return TaskData(
        num_rows=len(rows),
        num_prompts=len({p.prompt_id for p in rows}),
        samplings=dict(sorted(samplings.items())),
        prompt_tokens=int(median(len(p.prompt_tokens) for p in rows)),
        output_tokens=int(median(outputs)),
        total_output_tokens=sum(outputs),
    )


def _acceptance(
    rows: Sequence[CollectedPrompt], drafter: str, overlaps: Mapping[str, np.ndarray]
) -> Acceptance:
    # every position at which a round may start, if replay knows all of them
    places = np.concatenate([p.replays[drafter].table for p in rows]).astype(np.int64)
    rounds = np.concatenate([rounds_of(p, drafter) for p in rows]).astype(np.int64)
    drafts = places[places[:, 0] > 0]
    scored = [overlaps[row.id] for row in rows if len(overlaps.get(row.id, ()))]
    return Acceptance(
        match=float((drafts[:, 1] > 0).mean()) if len(drafts) else None,
        drafting=float((rounds[:, 0] > 0).mean()) if len(rounds) else 0.0,
        tokens_per_round=1.0 + float(rounds[:, 1].mean()) if len(rounds) else 1.0,
        overlap=float(np.concatenate(scored).mean()) if scored else None,
    )


def _oracles(
    prompts: Sequence[CollectedPrompt],
    by_task: dict[str, list[CollectedPrompt]],
    arms: Sequence[str],
    costs: CostTable,
) -> dict[str, Oracle]:
    seconds = round_table(prompts, arms).seconds(costs.seconds)  # [N, A]
    place = {prompt.id: i for i, prompt in enumerate(prompts)}
    found = {}
    for task, rows in by_task.items():
        own = seconds[[place[row.id] for row in rows]]
        wins = Counter(arms[i] for i in own.argmin(axis=1))
        speedup = own[:, list(arms).index(NONE)].sum() / own.min(axis=1).sum()
        shares = {arm: count / len(rows) for arm, count in wins.most_common()}
        found[task] = Oracle(shares, float(speedup))
    return found


def shares_by_drafter(oracle: Oracle) -> dict[str, float]:
    """Return the shares by drafter, over all its draft lengths."""
    shares: Counter[str] = Counter()
    for arm, share in oracle.shares.items():
        shares[split_arm(arm)[0]] += share  # type: ignore[assignment]
    return dict(shares)


def plot_collection(report: DataReport, path: Path) -> None:
    """Write a PNG: tokens per round by drafter and task, and the fastest drafters by task."""
    priced = bool(report.oracle)
    figure = import_figure()(figsize=(11 if priced else 6.5, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if priced else 1, squeeze=False)[0]
    _draw_acceptance(panels[0], report)
    if priced:
        _draw_oracle(panels[1], report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_acceptance(axes: Any, report: DataReport) -> None:
    tasks, drafters = list(report.tasks), list(report.acceptance)
    width = 0.8 / max(len(drafters), 1)
    for i, (name, by_task) in enumerate(report.acceptance.items()):
        heights = [by_task[task].tokens_per_round for task in tasks]
        axes.bar(np.arange(len(tasks)) + i * width, heights, width, label=name)
    axes.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
    axes.set_xticks(np.arange(len(tasks)) + 0.4 - width / 2, tasks)
    axes.set(ylabel="tokens per round", title="acceptance at configured lengths")
    if drafters:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_oracle(axes: Any, report: DataReport) -> None:
    tasks = list(report.oracle)
    shares = {task: shares_by_drafter(oracle) for task, oracle in report.oracle.items()}
    below = np.zeros(len(tasks))
    for name in (NONE, *report.acceptance):
        heights = np.array([shares[task].get(name, 0.0) for task in tasks])
        color = "0.75" if name == NONE else None
        axes.bar(np.arange(len(tasks)), heights, 0.7, bottom=below, label=name, color=color)
        below += heights
    labels = [f"{task}\n{report.oracle[task].speedup:.2f}x" for task in tasks]
    axes.set_xticks(np.arange(len(tasks)), labels)
    axes.set(ylabel="share of rows", title="fastest drafter of each row, at its best length")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
