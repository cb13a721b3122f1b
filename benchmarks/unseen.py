"""Is `auto` faster than the best single arm, by the clock, on prompts that no drafter was trained on?

    python benchmarks/unseen.py --data FOLDER [--folder FOLDER] [--prices FILE ...] [--dtypes bfloat16]

FOLDER has the prompts: translation, math, code and summary (.jsonl) and spec_bench.jsonl; the default is
PACELINE_DATA. It collects some unseen prompts of each task, profiles, learns, and decodes others: batch
1, interleaved turns, seconds end to end. The methods:

    none                the target alone
    best single arm     the arm with the least predicted seconds on the collected prompts, with cascades
                        and without them; the same for each task, without cascades
    auto, untrained     a lookup, and `none` where that does not pay by the clock
    auto                the learned policy's choice

A task that nothing was learned from: `auto` learns on the other three tasks, its lookup has their
answers alone, and it decodes the fourth's prompts, next to the best single arms of the three.
Spec-Bench is decoded as a fifth task, with the policy of all four. Predicted figures stand next to the
clocked ones, also at the prices of another machine (--prices). With --folder a stopped run continues its
collection.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from drafters import SPEC_BENCH, spec_bench
from result_pages import describe_run, save
from timed_setup import load_timed_config, make_parser, parse, show_progress
from unseen_predicted import arms_for, dataset_of, predict, price
from unseen_prompts import (
    add_cascades,
    check_collection,
    read_unseen,
    trained_on,
)
from unseen_report import (
    PER_TASK,
    SIMPLE,
    SINGLE,
    UNTRAINED,
    compare,
    compare_by_task,
    count_arms,
    differing,
    draw,
    markdown,
    summarise,
)

from paceline.assembly import Pace, build, build_controller, give_chances
from paceline.collection import collect_trajectories
from paceline.collection.answers import build_answers
from paceline.contracts import AUTO, NONE
from paceline.costs.table import CostTable
from paceline.drafting.suffix_lookup import SuffixLookup
from paceline.errors import ConfigError, PacelineError
from paceline.experiments.by_clock import RecordingMethods, encode_prompts, time_methods
from paceline.experiments.prompt_files import TASKS, read_spec_bench
from paceline.replay import price_rounds, stored_drafters
from paceline.selection import UntrainedController
from paceline.store.collection import load_collection, open_trajectories, read_trajectories
from paceline.verbs.pipeline import in_folder, prepare, train, with_store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from unseen_prompts import UnseenPrompts
    from unseen_report import Arms

    from paceline.bench.timed import TimedPrompt, Timing
    from paceline.config import Config
    from paceline.contracts import Completion, Progress, PromptRecord
    from paceline.learning import LearningResult
    from paceline.store.collection import LoadedCollection
    from paceline.store.records import CollectedPrompt
    from paceline.verbs.pipeline import Prepared

NAME = "unseen"
SPEC_BENCH_FILE = "spec_bench.jsonl"


class Clock:
    """Timed runs of arms and of `auto`, which may be several paces'. It keeps all completions."""

    def __init__(self, auto: Mapping[str, Pace], max_new_tokens: int, turns: int) -> None:
        """auto: method -> the pace whose drafter `auto` it is; the first one also runs the arms."""
        self._recorders = {
            name: RecordingMethods(pace, max_new_tokens=max_new_tokens)
            for name, pace in auto.items()
        }
        self._turns = turns

    def run(
        self, arms: Mapping[str, str], prompts: Sequence[TimedPrompt], stage: str, report: Progress
    ) -> list[Timing]:
        """Time the arms and `auto` on prompts. arms: method -> arm; methods of one arm share runs."""
        first = next(iter(self._recorders.values()))
        methods = {arm: first.method(arm) for arm in arms.values()}
        methods |= {
            name: own.method(name, lambda tokens: AUTO) for name, own in self._recorders.items()
        }
        timings = time_methods(methods, prompts, self._turns, stage, report)
        shown = {arm: [m for m, a in arms.items() if a == arm] for arm in arms.values()}
        return [
            replace(timing, method=method)
            for timing in timings
            for method in shown.get(timing.method, [timing.method])
        ]

    def completions(self, prompts: Sequence[TimedPrompt]) -> dict[str, list[Completion]]:
        """Return the last completions of the learned `auto` by task."""
        by_task: dict[str, list[Completion]] = {}
        for prompt in prompts:
            by_task.setdefault(prompt.domain, []).extend(self._recorders[AUTO].of(AUTO, [prompt]))
        return by_task


@dataclass(frozen=True, slots=True)
class Setup:
    """The result of collect, profile and learn, and the prompts to time in both forms."""

    config: Config
    folder: Path
    prepared: Prepared
    collection: LoadedCollection
    timed: list[PromptRecord]
    prompts: list[TimedPrompt]
    notes: list[str]


def set_up(options: argparse.Namespace, dtype: str, folder: Path, report: Progress) -> Setup:
    """Read the prompts, then collect, profile and learn in a folder."""
    config = add_cascades(load_timed_config(options, dtype, with_answers=True))
    config = in_folder(config, folder)
    trained = trained_on(config)
    unseen = read_unseen(options.data, trained, options.collect_per_task, options.per_task)
    check_collection(config.paths.store, unseen.collected)
    prepared = prepare(config, unseen.collected, options.max_new_tokens, report)
    timed, prompts = list(unseen.timed), encode_prompts(prepared.pace, unseen.timed)
    notes = [count_note(unseen)]
    if options.most_of_spec_bench:
        path = options.data / SPEC_BENCH_FILE
        if not path.is_file():
            raise ConfigError(
                f"{options.data}: no {path.name} in this data folder; add it, or give "
                "--most-of-spec-bench 0"
            )
        more, note = spec_bench(
            path, prepared.pace, options.max_new_tokens, options.most_of_spec_bench
        )
        chosen = {prompt.id for prompt in more}
        timed += [replace(r, domain=SPEC_BENCH) for r in read_spec_bench(path) if r.id in chosen]
        prompts += more
        notes.append(note)
    collection = load_collection(config.paths.store, stored_drafters(config))
    return Setup(config, folder, prepared, collection, timed, prompts, notes)


def count_note(unseen: UnseenPrompts) -> str:
    """Return the numbers of prompts by task in words."""
    collected = Counter(record.domain for record in unseen.collected)
    timed = Counter(record.domain for record in unseen.timed)
    counts = ", ".join(
        f"{task} {collected[task]} and {timed[task]} of {num}"
        for task, num in unseen.num_unseen.items()
    )
    return f"Collected and timed prompts, of those that no drafter was trained on: {counts}."


def measure(
    options: argparse.Namespace, dtype: str, folder: Path, report: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Return the figures of one dtype and the notes on its prompts."""
    marks = {"begin": perf_counter()}
    setup = set_up(options, dtype, folder, report)
    marks["set up"] = perf_counter()
    costs, learned = setup.prepared.costs, setup.prepared.learned
    priced = price(setup.collection, setup.config, costs)
    arms = arms_for(dataset_of(priced.prompts, setup.config, costs))
    run = {"dtype": dtype, "arms": arms._asdict(), **clocked(options, setup, arms, report)}
    marks["clocked"] = perf_counter()
    run["left_out"] = [left_out(options, setup, task, report) for task in TASKS]
    marks["left out"] = perf_counter()
    replayed = replay_timed(options, setup, report)
    tables = {"this machine": (costs, learned)}
    for file in options.prices:
        elsewhere = CostTable.load(file)
        there = price(setup.collection, setup.config, elsewhere)
        tables[machine_of(elsewhere)] = (elsewhere, train(there, setup.config, report))
    run["predicted"] = [
        {"prices": name, "clocked": own is costs} | predict_at(setup, replayed, own, policy)
        for name, (own, policy) in tables.items()
    ]
    marks["predicted"] = perf_counter()
    stages = list(marks)
    run["stage_seconds"] = setup.prepared.seconds | {
        after: marks[after] - marks[before] for before, after in pairwise(stages)
    }
    return run, setup.notes


def clocked(
    options: argparse.Namespace, setup: Setup, arms: Arms, report: Progress
) -> dict[str, Any]:
    """Time all methods on all prompts, with the policy of all tasks."""
    parts = setup.prepared.pace.parts
    lookup = next(n for n, d in parts.drafters.items() if isinstance(d, SuffixLookup))
    untrained = UntrainedController(lookup)
    paces = {AUTO: setup.prepared.pace, UNTRAINED: Pace(parts, untrained.choose, untrained)}
    clock = Clock(paces, options.max_new_tokens, options.turns)
    timings: list[Timing] = []
    for task in dict.fromkeys(prompt.domain for prompt in setup.prompts):
        of_task = [prompt for prompt in setup.prompts if prompt.domain == task]
        timings += clock.run(arms.of(task), of_task, f"by the clock, {task}", report)
    return {
        "methods": summarise(timings, arms, SPEC_BENCH),
        "auto_over": {
            method: compare_by_task(timings, AUTO, method, SPEC_BENCH)
            for method in (NONE, SIMPLE, SINGLE, PER_TASK, UNTRAINED)
        },
        "chosen": count_arms(clock.completions(setup.prompts)),
    }


def left_out(
    options: argparse.Namespace, setup: Setup, task: str, report: Progress
) -> dict[str, Any]:
    """Learn without a task, and time its prompts."""
    costs = setup.prepared.costs
    priced = price(setup.collection, setup.config, costs, without=task)
    arms = arms_for(dataset_of(priced.prompts, setup.config, costs))
    pace = pace_without(setup, task, train(priced, setup.config, report))
    clock = Clock({AUTO: pace}, options.max_new_tokens, options.turns_left_out)
    prompts = [prompt for prompt in setup.prompts if prompt.domain == task]
    methods = {NONE: NONE, SIMPLE: arms.simple, SINGLE: arms.single}
    timings = clock.run(methods, prompts, f"by the clock without {task}", report)
    rows = summarise(timings, arms, None)
    return {
        "task": task,
        "arms": arms._asdict(),
        "over_none": compare(timings, AUTO, NONE),
        "over_single": compare(timings, AUTO, SINGLE),
        "over_simple": compare(timings, AUTO, SIMPLE),
        "chosen": count_arms(clock.completions(prompts))[task],
        "prompts": len(prompts),
        "differing": differing(rows),
    }


def pace_without(setup: Setup, task: str, learned: LearningResult) -> Pace:
    """Return a pace with a policy that was learned without a task, and a lookup without its answers."""
    rows = read_trajectories(open_trajectories(setup.config.paths.store))
    folder = setup.folder / f"without-{task}"
    build_answers(setup.prepared.pace.parts, folder, [r for r in rows if r.domain != task])
    parts = build(with_store(setup.config, folder))
    for drafter in parts.drafters.values():
        drafter.price(setup.prepared.costs)
    give_chances(parts, learned.calibration)
    policy = learned.policy
    controller = build_controller(parts, policy.arms, setup.prepared.costs, policy.objective)
    return Pace(parts, policy.choose, controller)


def replay_timed(
    options: argparse.Namespace, setup: Setup, report: Progress
) -> list[CollectedPrompt]:
    """Return the timed prompts with every drafter's replay; their answers are in no lookup."""
    folder = setup.folder / f"timed-{len(setup.collection.prompts)}"
    pace = setup.prepared.pace
    collect_trajectories(pace, setup.timed, folder, options.max_new_tokens, on_progress=report)
    wanted = {prompt.id for prompt in setup.timed}
    loaded = load_collection(folder, stored_drafters(setup.config))
    return [prompt for prompt in loaded.prompts if prompt.prompt_id in wanted]


def predict_at(
    setup: Setup, replayed: Sequence[CollectedPrompt], costs: CostTable, learned: LearningResult
) -> dict[str, Any]:
    """Return the predicted figures of the timed prompts at the prices of a cost table."""
    priced = price(setup.collection, setup.config, costs)
    arms = arms_for(dataset_of(priced.prompts, setup.config, costs))
    rounds = price_rounds(replayed, setup.config, costs, priced.calibration)
    data = dataset_of(rounds, setup.config, costs)
    return predict(data, arms, learned.policy.chooser, setup.config, SPEC_BENCH)


def machine_of(costs: CostTable) -> str:
    """Return the machine that a cost table was measured on, and the table's hash."""
    machine = next((v for k, v in costs.fingerprint.items() if k in ("device", "cpu")), "unknown")
    return f"{machine}, {costs.hash()[:8]}"


def parse_options() -> argparse.Namespace:
    """Return the options of the command line. Raises ConfigError without a data folder."""
    data = Path(os.environ["PACELINE_DATA"]) if "PACELINE_DATA" in os.environ else None
    parser = make_parser(__doc__, per_task=40)
    parser.add_argument("--data", type=Path, default=data, help="folder of the prompts")
    parser.add_argument("--folder", type=Path, help="keeps collections, costs and policies")
    parser.add_argument("--collect-per-task", type=int, default=150)
    parser.add_argument("--most-of-spec-bench", type=int, default=40, help="0 for none")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--prices", nargs="*", type=Path, default=[], help="other cost tables")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--turns-left-out", type=int, default=3)
    options = parse(parser)
    if options.data is None:
        raise ConfigError("no prompts; name their folder with --data or PACELINE_DATA")
    return options


def run_all(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure every dtype; return all figures and the methods whose texts differ from `none`'s."""
    runs, notes = [], []
    with show_progress() as report:
        for dtype in options.dtypes:
            run, notes = measure(options, dtype, folder.resolve() / dtype, report)
            runs.append(run)
    setting = (
        f"Batch 1, {options.per_task} prompts of each task, at most {options.max_new_tokens} new "
        f"tokens, median of {options.turns} interleaved turns ({options.turns_left_out} where a task is "
        "left out), seconds end to end."
    )
    wrong = [
        line
        for run in runs
        for line in [
            *differing(run["methods"]),
            *(method for r in run["left_out"] for method in r["differing"]),
        ]
    ]
    return {"circumstances": describe_run(setting), "notes": notes, "runs": runs}, wrong


def main() -> None:
    """Measure and write the results. Exit with 1 if a text differs, with 2 on bad input."""
    try:
        options = parse_options()
        with tempfile.TemporaryDirectory() as folder:
            result, wrong = run_all(options, options.folder or Path(folder))
    except PacelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    save(options.out, NAME, markdown(result), result)
    draw(result, options.out / f"{NAME}.png")
    if wrong:
        print(f"error: texts differ from those of none: {'; '.join(wrong)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
