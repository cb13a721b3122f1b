"""Is any task slower than plain decoding? A timed stream of requests, with and without a controller.

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
import random
import tempfile
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from result_pages import page, save, table
from timed_setup import (
    complete,
    count_steps,
    load_prompts,
    make_parser,
    messages,
    parse,
    show_progress,
)

from paceline.assembly import Pace, Parts, build_controller, policy_identity
from paceline.bench.circumstances import circumstances
from paceline.bench.profile import measure_cost_table
from paceline.cli.options import configured
from paceline.config import SelectionSection
from paceline.contracts import AUTO, NONE, Drafts
from paceline.drafting.base import Drafter
from paceline.learning.evaluation.bootstrap import interval, resample
from paceline.plotting import import_figure
from paceline.selection import Policy, load_policy
from paceline.selection.choosers import RandomChooser
from paceline.verbs.pipeline import in_folder, load_priced, prepare, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.contracts import Completion, Progress, PromptRecord, RowView
    from paceline.costs import CostTable
    from paceline.engine.loop import Choose
    from paceline.verbs.pipeline import Prepared

ROOT = Path(__file__).resolve().parents[1]
NAME = "guard"
CONTROLS = {
    "alone": SelectionSection(),
    "guard": SelectionSection(guard=True),
    "guard and adaptation": SelectionSection(guard=True, adapt="within_request"),
}
ALL_TASKS = "all"
BEFORE, AFTER = "translation", "code"
WINDOW = 15


class WrongDrafter(Drafter):
    """A copy of another drafter that replaces every token by the id after it."""

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

    def identity(self) -> dict[str, object]:
        return {**self._right.identity(), "wrong": True}


@dataclass(slots=True)
class Case:
    """One way to decode, and its completion of every prompt."""

    name: str
    controlled: str
    pace: Pace
    runs: list[Completion] = field(default_factory=list)


def make_cases(
    name: str,
    parts: Parts,
    choose: Choose,
    arms: Sequence[str],
    costs: CostTable,
    controls: Sequence[str] = tuple(CONTROLS),
) -> list[Case]:
    """Return a case per way to control it."""
    cases = []
    for controlled in controls:
        section = CONTROLS[controlled]
        config = parts.config.model_copy(update={"selection": section})
        own = Parts(config, parts.target, parts.tokenizer, parts.vocabulary, parts.drafters)
        cases.append(Case(name, controlled, Pace(own, choose, build_controller(own, arms, costs))))
    return cases


def choose_randomly(arms: Sequence[str]) -> Choose:
    """Return a policy that chooses every arm equally often."""
    return Policy(RandomChooser(arms), "random").choose


def run_stream(
    records: Sequence[PromptRecord],
    cases: Sequence[Case],
    plain: Case,
    max_new_tokens: int,
    on_run: Callable[[], None],
) -> None:
    """Complete every prompt with every case and with `none`, in random order."""
    order = random.Random(1)
    warm = plain.pace.encode(messages(records[0].prompt))
    for case in (plain, *cases):  # named arms are not controlled: control begins with the stream
        for arm in case.pace.drafters:
            complete(case.pace, warm, arm, 8)
    for record in records:
        tokens = plain.pace.encode(messages(record.prompt))
        turns = [*cases, plain]
        order.shuffle(turns)
        for case in turns:
            arm = NONE if case is plain else AUTO
            case.runs.append(complete(case.pace, tokens, arm, max_new_tokens))
            on_run()


def ratio(plain: Sequence[Completion], runs: Sequence[Completion]) -> float:
    """Return seconds per token of `none` divided by the case's."""
    return float(_ratios(_columns(plain, runs).sum(axis=0)))


def _columns(plain: Sequence[Completion], runs: Sequence[Completion]) -> np.ndarray:
    """Return seconds and tokens of `none`, then of the case, per prompt [P, 4]."""
    pairs = zip(plain, runs, strict=True)
    return np.array(
        [[x for c in pair for x in (c.seconds_total, len(c.token_ids))] for pair in pairs]
    )


def _ratios(sums: np.ndarray) -> np.ndarray:
    """sums: [..., 4]."""
    return np.asarray((sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3]))


def by_task(
    records: Sequence[PromptRecord], plain: Case, case: Case
) -> dict[str, dict[str, float]]:
    """Return the ratio of all tasks and of each, with its 95% bootstrap interval over requests."""
    columns = _columns(plain.runs, case.runs)
    places = {ALL_TASKS: list(range(len(records)))}
    for i, record in enumerate(records):
        places.setdefault(record.domain, []).append(i)
    ratios = {}
    for task, of_task in places.items():
        sampled = resample(columns[of_task], [task] * len(of_task), seed=0)
        found = interval(float(_ratios(sampled.sums)[0]), _ratios(sampled.drawn)[:, 0])
        ratios[task] = {"ratio": found.value, "low": found.low, "high": found.high}
    return ratios


def bad_parts(parts: Parts) -> Parts:
    """Return the same target with always-wrong drafters."""
    num_tokens = parts.vocabulary.num_tokens
    wrong = [WrongDrafter(d, num_tokens) for name, d in parts.drafters.items() if name != NONE]
    drafters: dict[str, Drafter] = {NONE: parts.drafters[NONE], **{d.name: d for d in wrong}}
    return Parts(parts.config, parts.target, parts.tokenizer, parts.vocabulary, drafters)


def recovery(plain: Case, case: Case) -> list[float]:
    """Return the speed over `none` after each request, over the last WINDOW requests."""
    ends = range(1, len(case.runs) + 1)
    return [
        ratio(plain.runs[max(0, i - WINDOW) : i], case.runs[max(0, i - WINDOW) : i]) for i in ends
    ]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the ratios of all cases, and the speed along the shifting stream."""
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
        ylabel="speed over none", title="By task, with 95% intervals; dotted: the required 0.98"
    )
    above.legend(fontsize=7)
    shift = result["shift"]
    for controlled, speeds in shift["course"].items():
        below.plot(range(1, len(speeds) + 1), speeds, label=controlled)
    below.axvline(shift["at"] + 0.5, color="0.3", linewidth=0.8)
    below.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
    below.set(
        xlabel=f"request; {BEFORE} before the line, {AFTER} after it",
        ylabel=f"speed over none, last {WINDOW}",
        title=f"A policy learned only on {BEFORE}",
    )
    below.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def markdown(result: dict[str, Any]) -> str:
    """Return the page."""
    rows = result["cases"]
    tasks = list(rows[0]["tasks"])
    lines = page(
        "With and without a controller: speed over plain decoding, by task",
        {**result["circumstances"], "setting": result["setting"]},
        "transformers",
    )
    interval_of = "{{tasks[{0}][ratio]:.3f}} [{{tasks[{0}][low]:.3f}}, {{tasks[{0}][high]:.3f}}]"
    worst = [min(f["ratio"] for task, f in r["tasks"].items() if task != ALL_TASKS) for r in rows]
    lines += table(
        ({**row, "worst": ratio} for row, ratio in zip(rows, worst, strict=True)),
        {
            "case": "{case}",
            "controlled by": "{controlled}",
            **{task: interval_of.format(task) for task in tasks},
            "worst task": "{worst:.3f}",
            "arms per request": "{arms:.2f}",
        },
    )
    parts = [BEFORE, f"{AFTER}, first half", f"{AFTER}, second half"]
    columns = {part: f"{{speeds[{i}]:.3f}}" for i, part in enumerate(parts)}
    shift = result["shift"]["speeds"].items()
    lines += ["", *table(
        ({"controlled": controlled, "speeds": speeds} for controlled, speeds in shift),
        {"controlled by": "{controlled}", **columns},
    )]  # fmt: skip
    lines += ["", "Reports of the guards at the end:", ""]
    for row in rows:
        lines += [f"- {row['case']}, {row['controlled']}: {line}" for line in row["report"]]
    return "\n".join(lines) + "\n"


def run_mixed(
    options: argparse.Namespace,
    records: Sequence[PromptRecord],
    prepared: Prepared,
    policy: Policy,
    report: Progress,
) -> list[dict[str, Any]]:
    """Run the stream of all tasks through all cases; return a row of the table per case."""
    parts, costs = prepared.pace.parts, prepared.costs
    choose, arms = policy.choose, policy.arms
    plain = Case(NONE, "", Pace(parts))
    both = ("alone", "guard and adaptation")
    cases: list[Case] = []
    if "auto" in options.cases:
        cases += make_cases("auto", parts, choose, arms, costs, both)
    if "random" in options.cases:
        cases += make_cases("random", parts, choose_randomly(arms), arms, costs, both)
    if "bad" in options.cases:
        bad = bad_parts(parts)
        bad_costs = measure_cost_table(bad, on_progress=report)
        wrong = [name for name in bad.drafters if name != NONE]
        cases += make_cases("bad drafters", bad, choose_randomly(wrong), wrong, bad_costs)
    on_run = count_steps(report, "mixed stream", len(records) * (len(cases) + 1))
    run_stream(records, cases, plain, options.max_new_tokens, on_run)
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


def run_shifting(
    options: argparse.Namespace,
    records: Sequence[PromptRecord],
    prepared: Prepared,
    report: Progress,
) -> dict[str, Any]:
    """Run first one domain, then another, under a policy that was learned only on the first."""
    parts = prepared.pace.parts
    priced = load_priced(parts.config)
    known = [p for p in priced.prompts if p.domain == BEFORE]
    policy = train(replace(priced, prompts=known), parts.config, report).policy
    ordered = [r for d in (BEFORE, AFTER) for r in records if r.domain == d]
    at = sum(r.domain == BEFORE for r in ordered)
    plain = Case(NONE, "", Pace(parts))
    cases = make_cases("shift", parts, policy.choose, policy.arms, prepared.costs)
    on_run = count_steps(report, "shifting stream", len(ordered) * (len(cases) + 1))
    run_stream(ordered, cases, plain, options.max_new_tokens, on_run)
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


def main() -> None:
    """Run both streams and write the results."""
    parser = make_parser(__doc__)
    parser.set_defaults(threads=None)
    parser.add_argument("--config", type=Path, default=ROOT / "paceline.yaml")
    parser.add_argument("--data", type=Path, help="folder of JSONL files, else the demo's prompts")
    parser.add_argument("--policy", type=Path, help="a learned policy, else one is learned here")
    parser.add_argument("--work", type=Path, help="keeps collection and costs between runs")
    parser.add_argument("--dtype", help="the target's, else as configured")
    parser.add_argument("--per-task", type=int, default=100, help="requests of the mixed stream")
    parser.add_argument("--shift", type=int, default=60, help="requests per domain of the shift")
    parser.add_argument("--collect", type=int, default=24, help="prompts per task to learn from")
    parser.add_argument("--cases", nargs="+", default=["auto", "random", "bad"])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parse(parser)
    with tempfile.TemporaryDirectory() as folder, show_progress() as report:
        result = measure(options, options.work or Path(folder), report)
    save(options.out, NAME, markdown(result), result)
    draw(result, options.out / f"{NAME}.png")


def measure(options: argparse.Namespace, work: Path, report: Progress) -> dict[str, Any]:
    """Collect, profile and learn in `work`, then run both streams."""
    config = configured(options.config, options.dtype, threads=options.threads)
    num = max(options.per_task, options.shift)
    collected, timed = load_prompts(options.collect, num, options.data)
    prepared = prepare(
        in_folder(config, work), collected, options.max_new_tokens, on_progress=report
    )
    parts = prepared.pace.parts
    policy: Policy = prepared.learned.policy
    if options.policy is not None:
        policy = load_policy(options.policy, policy_identity(parts), prepared.costs)
    mix, shift = take(timed, options.per_task), take(timed, options.shift)
    random.Random(0).shuffle(mix)
    return {
        "circumstances": circumstances(),
        "setting": (
            f"{len(mix)} requests of up to {options.max_new_tokens} tokens, one at a time, target in "
            f"{parts.target.dtype}, policy {policy.id} over {len(policy.arms)} arms."
        ),
        "cases": run_mixed(options, mix, prepared, policy, report),
        "shift": run_shifting(options, shift, prepared, report),
    }


def take(records: Sequence[PromptRecord], num: int) -> list[PromptRecord]:
    """Return `num` records per task, repeating them where there are fewer."""
    by_domain: dict[str, list[PromptRecord]] = {}
    for record in records:
        by_domain.setdefault(record.domain, []).append(record)
    return [r for of in by_domain.values() for r in islice(cycle(of), num)]


if __name__ == "__main__":
    main()
