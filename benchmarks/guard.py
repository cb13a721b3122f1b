"""Is any task slower than plain decoding? A stream of requests, by the clock, with and without a controller.

    python benchmarks/guard.py [--per-task 100] [--shift 60] [--data FOLDER] [--policy FOLDER]

Every request of a mixed stream is decoded by `none` and by every case, interleaved in one process, in
an order that changes per request. Each case keeps its own controller from the first request on, so
the time the controller needs to learn counts. Seconds are end to end: prefill, choice, starts of
drafters, shadow drafts, rounds. A ratio is the seconds per token of `none` divided by the case's; its
95% interval is a bootstrap over requests. The cases:

    auto          the learned policy's choice
    random        a random arm for every request
    bad drafters  a random choice among always-wrong drafters: the bundled ones with every token
                  replaced by another, so that they cost the same and are never accepted

Each case runs alone and with guard and adaptation; bad drafters also run with the guard only. A second
stream shifts from translation to code under a policy that was learned on translation only.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from rich.console import Console
from transformers.utils import logging as transformers_logging

from paceline.assembly import Pace, Parts, build_controller, policy_identity
from paceline.bench.circumstances import circumstances, headline
from paceline.bench.profile import profile
from paceline.cli.options import configured
from paceline.cli.progress import progress
from paceline.config import PathsSection, SelectionSection
from paceline.contracts import NONE, Drafts
from paceline.drafting.base import Drafter, Foresight
from paceline.drafting.catalog import arms_of
from paceline.experiments.demo_prompts import demo_prompts
from paceline.experiments.pipeline import prepare
from paceline.experiments.prompt_files import TASKS
from paceline.files import write_atomically
from paceline.layer_search.plot import import_figure
from paceline.learning import learn
from paceline.selection import Policy, load_policy
from paceline.selection.choosers import RandomChooser
from paceline.store import read_prompts
from paceline.store.collection import load_collection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.cli.progress import Report
    from paceline.contracts import Completion, PromptRecord, RowView
    from paceline.costs import CostTable
    from paceline.engine.loop import Choose
    from paceline.selection import PolicyIdentity

ROOT = Path(__file__).resolve().parents[1]
NAME = "guard"
WATCHES = {
    "alone": SelectionSection(),
    "guard": SelectionSection(guard=True),
    "guard and adaptation": SelectionSection(guard=True, adapt="within_request"),
}
ALL_TASKS = "all"
BEFORE, AFTER = "translation", "code"
WINDOW = 15


class Wrong(Drafter):
    """Drafts as another drafter does, every token but replaced by the id after it."""

    kind: ClassVar[str] = "wrong"

    def __init__(self, right: Drafter, num_tokens: int) -> None:
        super().__init__(f"wrong {right.name}", right.num_draft_tokens)
        self.needs = right.needs  # type: ignore[misc]
        self._right = right
        self._num_tokens = num_tokens

    def start(self, rows: Sequence[RowView]) -> None:
        self._right.start(rows)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        return self._right.prepare(row, max_tokens)

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        drafts = self._right.propose(rows, limits)
        drafts.tokens = (drafts.tokens + 1) % self._num_tokens
        return drafts

    def finish(self, rows: Sequence[RowView]) -> None:
        self._right.finish(rows)

    def would_accept(self, *given: Any, **settings: Any) -> Foresight:
        raise NotImplementedError("is never replayed")

    def identity(self) -> dict[str, object]:
        return {**self._right.identity(), "wrong": True}


@dataclass(slots=True)
class Case:
    """One way to decode, and what every prompt took with it."""

    name: str
    controlled: str
    pace: Pace
    runs: list[Completion] = field(default_factory=list)

    def run(self, tokens: Sequence[int], drafter: str, max_new_tokens: int) -> None:
        settings = {
            "drafter": drafter,
            "max_new_tokens": max_new_tokens,
            "generation_config": "none",
        }
        self.runs.append(self.pace.complete(tokens, **settings))  # type: ignore[arg-type]


def cases_of(
    name: str,
    parts: Parts,
    choose: Choose,
    arms: Sequence[str],
    costs: CostTable,
    controls: Sequence[str] = tuple(WATCHES),
) -> list[Case]:
    """A case for every way to controller."""
    found = []
    for controlled in controls:
        section = WATCHES[controlled]
        config = parts.config.model_copy(update={"selection": section})
        own = Parts(config, parts.target, parts.tokenizer, parts.vocabulary, parts.drafters)
        found.append(Case(name, controlled, Pace(own, choose, build_controller(own, arms, costs))))
    return found


def by_lot(arms: Sequence[str]) -> Choose:
    """Every arm equally often."""
    return Policy(RandomChooser(arms), "by lot").choose


def stream(
    records: Sequence[PromptRecord],
    cases: Sequence[Case],
    plain: Case,
    max_new_tokens: int,
    on_run: Callable[[], None],
) -> None:
    """Every prompt through every case, `none` among them."""
    order = random.Random(1)
    warm = plain.pace.encode([{"role": "user", "content": records[0].prompt}])
    for case in (plain, *cases):  # not controlled: the controls begin with the stream
        for arm in case.pace.drafters:
            case.pace.complete(warm, drafter=arm, max_new_tokens=8, generation_config="none")
    for record in records:
        tokens = plain.pace.encode([{"role": "user", "content": record.prompt}])
        turns = [*cases, plain]
        order.shuffle(turns)
        for case in turns:
            case.run(tokens, NONE if case is plain else "auto", max_new_tokens)
            on_run()


def ratio(plain: Sequence[Completion], runs: Sequence[Completion]) -> float:
    """Seconds a token of `none` over the case's."""

    def pace(of: Sequence[Completion]) -> float:
        return sum(c.seconds_total for c in of) / sum(len(c.token_ids) for c in of)

    return pace(plain) / pace(runs)


def with_interval(plain: Sequence[Completion], runs: Sequence[Completion]) -> dict[str, float]:
    order = np.random.default_rng(0)
    seconds = np.array([[c.seconds_total for c in of] for of in (plain, runs)])  # [2, P]
    tokens = np.array([[len(c.token_ids) for c in of] for of in (plain, runs)])
    drawn = order.integers(0, len(runs), (2000, len(runs)))
    paces = seconds[:, drawn].sum(-1) / tokens[:, drawn].sum(-1)  # [2, draws]
    low, high = np.quantile(paces[0] / paces[1], [0.025, 0.975])
    return {"ratio": ratio(plain, runs), "low": float(low), "high": float(high)}


def by_task(
    records: Sequence[PromptRecord], plain: Case, case: Case
) -> dict[str, dict[str, float]]:
    tasks = {ALL_TASKS: list(range(len(records)))}
    for i, record in enumerate(records):
        tasks.setdefault(record.domain, []).append(i)
    return {
        task: with_interval([plain.runs[i] for i in of], [case.runs[i] for i in of])
        for task, of in tasks.items()
    }


def bad_parts(parts: Parts) -> Parts:
    """The same target among drafters that are never right."""
    num_tokens = parts.vocabulary.num_tokens
    wrong = [Wrong(d, num_tokens) for name, d in parts.drafters.items() if name != NONE]
    drafters: dict[str, Drafter] = {NONE: parts.drafters[NONE], **{d.name: d for d in wrong}}
    return Parts(parts.config, parts.target, parts.tokenizer, parts.vocabulary, drafters)


def recovery(plain: Case, case: Case) -> list[float]:
    """Speed over `none` along the stream, over the last WINDOW requests."""
    ends = range(1, len(case.runs) + 1)
    return [
        ratio(plain.runs[max(0, i - WINDOW) : i], case.runs[max(0, i - WINDOW) : i]) for i in ends
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    figure = import_figure()(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 1)
    rows = result["cases"]
    for t, task in enumerate(rows[0]["tasks"]):
        found = [row["tasks"][task] for row in rows]
        at = np.arange(len(rows)) + (t - 2) * 0.14
        values = np.array([f["ratio"] for f in found])
        spread = [values - [f["low"] for f in found], [f["high"] for f in found] - values]
        above.errorbar(at, values, yerr=np.abs(spread), fmt="o", markersize=3, label=task)
    above.set_xticks(
        range(len(rows)), [f"{r['case']}\n{r['controlled']}" for r in rows], fontsize=7
    )
    above.axhline(0.98, color="0.3", linewidth=0.8, linestyle=":")
    above.set(
        ylabel="speed over none", title="By task, with 95% intervals; dotted: the promise, 0.98"
    )
    above.legend(fontsize=7)
    shift = result["shift"]
    for controlled, speeds in shift["course"].items():
        below.plot(range(1, len(speeds) + 1), speeds, label=controlled)
    below.axvline(shift["at"] + 0.5, color="0.3", linewidth=0.8)
    below.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
    below.set(
        xlabel=f"request; {BEFORE} up to the line, {AFTER} behind it",
        ylabel=f"speed over none, last {WINDOW}",
        title=f"A policy learned on {BEFORE} alone",
    )
    below.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def markdown(result: dict[str, Any]) -> str:
    rows = result["cases"]
    tasks = list(rows[0]["tasks"])
    lines = [
        "# Controlled and not: speed over plain decoding, by task",
        "",
        f"{headline(result['circumstances'], 'transformers')} {result['setting']}",
        "",
        f"| case | controlled by | {' | '.join(tasks)} | worst task | arms a request |",
        "|---|---|" + "---|" * (len(tasks) + 2),
    ]
    for row in rows:
        cells = [
            f"{f['ratio']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in row["tasks"].values()
        ]
        worst = min(f["ratio"] for task, f in row["tasks"].items() if task != ALL_TASKS)
        lines.append(
            f"| {row['case']} | {row['controlled']} | {' | '.join(cells)} | {worst:.3f} | "
            f"{row['arms']:.2f} |"
        )
    heads = ["controlled by", BEFORE, f"{AFTER}, first half", f"{AFTER}, second half"]
    lines += ["", f"| {' | '.join(heads)} |", "|---|---|---|---|"]
    for controlled, parts in result["shift"]["speeds"].items():
        lines.append(f"| {controlled} | " + " | ".join(f"{speed:.3f}" for speed in parts) + " |")
    lines += ["", "What the guards report at the end:", ""]
    for row in rows:
        lines += [f"- {row['case']}, {row['controlled']}: {line}" for line in row["report"]]
    return "\n".join(lines) + "\n"


@dataclass(slots=True)
class Made:
    """What collecting, measuring and learning brought, beside its identity."""

    pace: Pace
    costs: CostTable
    policy: Policy
    identity: PolicyIdentity


def mixed(
    options: argparse.Namespace, records: Sequence[PromptRecord], made: Made, report: Report
) -> list[dict[str, Any]]:
    """The stream of all tasks through all cases; a row of the table for each."""
    parts, costs = made.pace.parts, made.costs
    choose, arms = made.policy.choose, made.policy.arms
    plain = Case(NONE, "", Pace(parts))
    both = ("alone", "guard and adaptation")
    cases: list[Case] = []
    if "auto" in options.cases:
        cases += cases_of("auto", parts, choose, arms, costs, both)
    if "random" in options.cases:
        cases += cases_of("random", parts, by_lot(arms), arms, costs, both)
    if "bad" in options.cases:
        bad = bad_parts(parts)
        bad_costs = profile(bad, on_progress=report)
        wrong = [name for name in bad.drafters if name != NONE]
        cases += cases_of("bad drafters", bad, by_lot(wrong), wrong, bad_costs)
    counted = counter(report, "mixed stream", len(records) * (len(cases) + 1))
    stream(records, cases, plain, options.max_new_tokens, counted)
    return [
        {
            "case": case.name,
            "controlled": case.controlled,
            "tasks": by_task(records, plain, case),
            "arms": float(np.mean([1 + len(c.switches) for c in case.runs])),
            "report": case.pace.controller.report() if case.pace.controller is not None else [],
        }
        for case in cases
    ]


def shifting(
    options: argparse.Namespace, records: Sequence[PromptRecord], made: Made, report: Report
) -> dict[str, Any]:
    """First one domain, then another, under a policy that was learned on the first alone."""
    parts = made.pace.parts
    config = parts.config
    collection = load_collection(config.paths.store, list(config.drafters))
    known = [p for p in collection.prompts if p.domain == BEFORE]
    policy = learn(
        known, made.costs, made.identity, arms_of(config), config.learning, report
    ).policy
    ordered = [r for d in (BEFORE, AFTER) for r in records if r.domain == d]
    at = sum(r.domain == BEFORE for r in ordered)
    plain = Case(NONE, "", Pace(parts))
    cases = cases_of("shift", parts, policy.choose, policy.arms, made.costs)
    counted = counter(report, "shifting stream", len(ordered) * (len(cases) + 1))
    stream(ordered, cases, plain, options.max_new_tokens, counted)
    half = at + (len(ordered) - at) // 2
    pieces = [slice(0, at), slice(at, half), slice(half, len(ordered))]
    return {
        "at": at,
        "course": {case.controlled: recovery(plain, case) for case in cases},
        "speeds": {
            case.controlled: [ratio(plain.runs[piece], case.runs[piece]) for piece in pieces]
            for case in cases
        },
    }


def counter(report: Report, stage: str, total: int) -> Callable[[], None]:
    done = 0

    def on_run() -> None:
        nonlocal done
        done += 1
        report(stage, done, total)

    return on_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=ROOT / "paceline.yaml")
    parser.add_argument("--data", type=Path, help="folder of JSONL files, else the demo's prompts")
    parser.add_argument("--policy", type=Path, help="a learned policy, else one is learned here")
    parser.add_argument("--work", type=Path, help="keeps collection and costs from run to run")
    parser.add_argument("--dtype", help="the target's, else as configured")
    parser.add_argument("--per-task", type=int, default=100, help="requests of the mixed stream")
    parser.add_argument(
        "--shift", type=int, default=60, help="requests of each domain of the shift"
    )
    parser.add_argument("--collect", type=int, default=24, help="prompts a task to learn from")
    parser.add_argument("--cases", nargs="+", default=["auto", "random", "bad"])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    console = Console()
    with tempfile.TemporaryDirectory() as folder, progress(console) as report:
        result = measure(options, options.work or Path(folder), report)
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    write_atomically(options.out / f"{NAME}.md", text.encode())
    write_atomically(options.out / f"{NAME}.json", (json.dumps(result, indent=1) + "\n").encode())
    plot(result, options.out / f"{NAME}.png")
    console.print(text, markup=False, highlight=False)


def measure(options: argparse.Namespace, work: Path, report: Report) -> dict[str, Any]:
    config = configured(options.config, options.dtype)
    paths = PathsSection(store=work / "store", costs=work / "costs.json", policy=work / "policy")
    config = config.model_copy(update={"paths": paths})
    collected, timed = prompts(options)
    prepared = prepare(config, collected, options.max_new_tokens, on_progress=report)
    parts = prepared.pace.parts
    identity = policy_identity(parts)
    policy: Policy = prepared.learned.policy
    if options.policy is not None:
        policy = load_policy(options.policy, identity, prepared.costs)
    made = Made(prepared.pace, prepared.costs, policy, identity)
    mix, shift = taken(timed, options.per_task), taken(timed, options.shift)
    random.Random(0).shuffle(mix)
    return {
        "circumstances": circumstances(),
        "setting": (
            f"{len(mix)} requests of up to {options.max_new_tokens} tokens, one at a time, target in "
            f"{parts.target.dtype}, policy {policy.id} over {len(policy.arms)} arms."
        ),
        "cases": mixed(options, mix, made, report),
        "shift": shifting(options, shift, made, report),
    }


def prompts(options: argparse.Namespace) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """To learn from, and for the streams; they share none."""
    num = max(options.per_task, options.shift)
    if options.data is None:
        # so many were written of math and translation; the streams then repeat themselves
        return demo_prompts(options.collect, min(num, 72 - options.collect))
    collected: list[PromptRecord] = []
    timed: list[PromptRecord] = []
    for task in TASKS:
        of_task = read_prompts([options.data / f"{task}.jsonl"])
        chosen = random.Random(0).sample(of_task, min(len(of_task), options.collect + num))
        collected += chosen[: options.collect]
        timed += chosen[options.collect :]
    return collected, timed


def taken(records: Sequence[PromptRecord], num: int) -> list[PromptRecord]:
    """So many of each task, over again where there are fewer."""
    by_domain: dict[str, list[PromptRecord]] = {}
    for record in records:
        by_domain.setdefault(record.domain, []).append(record)
    return [r for of in by_domain.values() for r in islice(cycle(of), num)]


if __name__ == "__main__":
    main()
