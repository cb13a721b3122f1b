"""More rows in flight: when do shorter drafts, or none, become the better arm? On the bundled models.

    python benchmarks/load.py [--rows 1 2 4 8 16] [--per-task 8] [--dtype bfloat16]

Two questions by the clock beside what the price table says. Throughput: so many rows are kept in flight
and all use the method; tokens a second while all of them are. Latency: one request after the other uses
the method beside rows that decode plainly and go on all the time; milliseconds a token of these
requests. `specialist` is the drafter named like a prompt's task, at several draft lengths. Prompts come
task by task, so that most rows in flight share their drafter, as the price for throughput supposes;
`auto` is the policy of the configuration, where there is one that fits it. Predictions are replays of
each arm on what `none` wrote.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paceline.assembly import Pace, build, policy_identity
from paceline.bench.circumstances import circumstances, headline
from paceline.bench.profile import measure_cost_table
from paceline.bench.timed import TimedPrompt
from paceline.cli.options import configured
from paceline.cli.progress import progress
from paceline.contracts import AUTO, NONE, join_arm, split_arm
from paceline.costs import CostTable
from paceline.experiments.by_clock import encode_prompts
from paceline.experiments.demo_prompts import demo_prompts
from paceline.files import write_atomically
from paceline.replay import max_output, replay, walk
from paceline.rewards import request_seconds
from paceline.selection import is_policy, load_policy

if TYPE_CHECKING:
    from paceline.contracts import Completion
    from paceline.contracts import Progress as Report
    from paceline.costs import Objective
    from paceline.engine import RequestUpdate

SPECIALIST = "specialist"
BACKGROUND_TOKENS = 512  # of each plain row beside a request: seldom a prefill among them
OBJECTIVES: tuple[Objective, ...] = ("latency", 0.5, "throughput")
Arm = Callable[[TimedPrompt], str]  # which arm a method gives a prompt


@dataclass(frozen=True, slots=True)
class Point:
    """One method with so many rows in flight. Throughput in tokens/s, latency in seconds a token."""

    method: str
    rows: int
    throughput: float
    latency: float
    predicted_throughput: float | None  # of a method whose arms are known beforehand
    predicted_latency: float | None


# --- methods --------------------------------------------------------------------------------------


def methods_of(pace: Pace, lengths: Sequence[int]) -> dict[str, Arm]:
    """Plain decoding, the specialists at each length and at their own, lookup, and the policy."""
    drafters = pace.parts.drafters

    def specialist(prompt: TimedPrompt, length: int | None = None) -> str:
        name = prompt.domain if prompt.domain in drafters else NONE
        if name == NONE or length is None or length >= drafters[name].num_draft_tokens:
            return name
        return join_arm(name, length)

    found: dict[str, Arm] = {NONE: lambda prompt: NONE}
    for length in lengths:
        found[join_arm(SPECIALIST, length)] = lambda p, length=length: specialist(p, length)  # type: ignore[misc]
    found[SPECIALIST] = specialist
    if "lookup" in drafters:
        found["lookup"] = lambda prompt: "lookup"
    if pace.engine.choose is not None:
        found[AUTO] = lambda prompt: AUTO
    return found


def loaded(options: argparse.Namespace) -> Pace:
    """The models, with room for all rows, and the policy if it is there."""
    config = configured(options.config, dtype=options.dtype, threads=options.threads)
    update = {"prefix_positions": 0, "max_rows": max(options.rows)}
    engine = config.engine.model_copy(update=update)
    parts = build(config.model_copy(update={"engine": engine}))
    folder = parts.config.paths.policy
    policy = None
    if is_policy(folder):
        costs = CostTable.load(parts.config.paths.costs)
        policy = load_policy(folder, policy_identity(parts), costs, parts.config.selection)
    return Pace(parts, policy.choose if policy is not None else None)


# --- by the clock ---------------------------------------------------------------------------------


class Load:
    """Keeps requests in flight and counts what they bring."""

    def __init__(self, pace: Pace, new_tokens: int) -> None:
        self._pace, self._new_tokens = pace, new_tokens
        self._mail: SimpleQueue[RequestUpdate] = SimpleQueue()  # of all requests

    def throughput(self, arm: Arm, prompts: Sequence[TimedPrompt], rows: int) -> float:
        """Tokens a second from the first prefill until fewer rows than `rows` are left."""
        waiting, flying = deque(prompts), set[int]()
        tokens, began = 0, perf_counter()
        while True:
            while waiting and len(flying) < rows:
                flying.add(self._submit(arm, waiting.popleft()))
            if not waiting and len(flying) < rows:
                break
            found = self._mail.get()
            tokens += len(found.new_tokens)
            if found.completion is not None:
                flying.discard(found.ticket)
        spent = perf_counter() - began
        self._clear(flying)
        return tokens / spent

    def latency(
        self, arm: Arm, prompts: Sequence[TimedPrompt], rows: int
    ) -> tuple[float, list[Completion]]:
        """Seconds a token of requests, one at a time beside rows - 1 plain ones, and their answers."""
        plain = cycle(prompts)
        beside = {self._background(next(plain)) for _ in range(rows - 1)}
        started: set[int] = set()
        while started != beside:
            found = self._mail.get()
            started |= {found.ticket} if found.new_tokens else set()
        done: list[Completion] = []
        for prompt in prompts:
            own = self._submit(arm, prompt)
            answered = False
            while not answered:
                found = self._mail.get()
                if found.completion is None:
                    continue
                answered = found.ticket == own
                if answered:
                    done.append(found.completion)
                else:
                    beside.remove(found.ticket)
                    beside.add(self._background(next(plain)))
        self._clear(beside)
        return sum(c.seconds_total for c in done) / sum(len(c.token_ids) for c in done), done

    def _submit(self, arm: Arm, prompt: TimedPrompt) -> int:
        request = self._pace.request(
            list(prompt.tokens),
            max_new_tokens=self._new_tokens,
            drafter=arm(prompt),
            generation_config="none",
        )
        return self._pace.driver.submit(request, self._mail.put)

    def _background(self, prompt: TimedPrompt) -> int:
        request = self._pace.request(
            list(prompt.tokens),
            max_new_tokens=BACKGROUND_TOKENS,
            drafter=NONE,
            ignore_eos=True,
            generation_config="none",
        )
        return self._pace.driver.submit(request, self._mail.put)

    def _clear(self, tickets: set[int]) -> None:
        """Cancel requests and wait until their rows are free."""
        for ticket in tickets:
            self._pace.driver.cancel(ticket)
        left = set(tickets)
        while left:
            found = self._mail.get()
            if found.completion is not None:
                left.discard(found.ticket)


# --- predicted ------------------------------------------------------------------------------------


class Predictions:
    """Seconds of arms on prompts whose plain answers are known."""

    def __init__(
        self, pace: Pace, costs: CostTable, answers: dict[str, Sequence[int]], new_tokens: int
    ) -> None:
        self._pace, self._costs = pace, costs
        self._answers, self._new_tokens = answers, new_tokens
        self._rounds: dict[tuple[str, str], Any] = {}

    def per_token(
        self, arm: Arm, prompts: Sequence[TimedPrompt], rows: int, objective: Objective
    ) -> float:
        """Seconds a token over all prompts."""
        total = sum(
            request_seconds(
                self._costs.seconds,
                arm(p),
                len(p.tokens),
                self._rounds_of(arm(p), p),
                rows,
                objective,
            )
            for p in prompts
        )
        return total / sum(len(self._answers[p.id]) for p in prompts)

    def _rounds_of(self, arm: str, prompt: TimedPrompt) -> Any:
        found = self._rounds.get((arm, prompt.id))
        if found is None:
            name, length = split_arm(arm)
            limit = max_output(
                self._new_tokens, len(prompt.tokens), self._pace.parts.target.context_length
            )
            own = replay(
                self._pace.parts.drafters[name], prompt.tokens, self._answers[prompt.id], limit
            )
            found = own.rounds
            if length is not None:
                assert own.ahead is not None  # a specialist nests
                found = walk(own.ahead, length)
            self._rounds[arm, prompt.id] = found
        return found


def best_lengths(
    predictions: Predictions, pace: Pace, prompts: Sequence[TimedPrompt], most_rows: int
) -> dict[str, list[int]]:
    """objective -> the specialists' best draft length with 1, 2, ... rows in flight; 0 is `none`."""
    longest = max(
        (
            d.num_draft_tokens
            for n, d in pace.parts.drafters.items()
            if n in {p.domain for p in prompts}
        ),
        default=0,
    )
    methods = methods_of(pace, range(1, longest + 1))
    arms = [methods[NONE], *(methods[join_arm(SPECIALIST, k)] for k in range(1, longest + 1))]
    found = {}
    for objective in OBJECTIVES:
        found[str(objective)] = [
            min(
                range(len(arms)),
                key=lambda k: predictions.per_token(arms[k], prompts, rows, objective),
            )
            for rows in range(1, most_rows + 1)
        ]
    return found


# --- the whole ------------------------------------------------------------------------------------


def measure(
    pace: Pace, costs: CostTable, prompts: Sequence[TimedPrompt], options: argparse.Namespace,
    report: Report,
) -> tuple[list[Point], dict[str, list[int]]]:  # fmt: skip
    load = Load(pace, options.max_new_tokens)
    _, plain = load.latency(lambda prompt: NONE, prompts, 1)  # warms up, and gives the answers
    answers = {p.id: c.token_ids for p, c in zip(prompts, plain, strict=True)}
    predictions = Predictions(pace, costs, answers, options.max_new_tokens)
    methods = methods_of(pace, options.draft_lengths)
    clocked: dict[tuple[str, int], tuple[float, float]] = {}
    for i, rows in enumerate(options.rows):
        many = list(islice(cycle(prompts), max(len(prompts), options.requests_per_row * rows)))
        many.sort(key=lambda prompt: prompt.domain)
        order = random.Random(rows).sample(list(methods), len(methods))
        for j, name in enumerate(order, start=1):
            arm = methods[name]
            clocked[name, rows] = (
                load.throughput(arm, many, rows), load.latency(arm, prompts, rows)[0]
            )  # fmt: skip
            report("by the clock", i * len(methods) + j, len(methods) * len(options.rows))
    points = []
    for (name, rows), (throughput, latency) in clocked.items():
        known = name != AUTO
        points.append(
            Point(
                name,
                rows,
                throughput,
                latency,
                1 / predictions.per_token(methods[name], prompts, rows, "throughput")
                if known
                else None,
                predictions.per_token(methods[name], prompts, rows, "latency") if known else None,
            )
        )
    points.sort(key=lambda p: (list(methods).index(p.method), p.rows))
    return points, best_lengths(predictions, pace, prompts, max(options.rows))


def markdown(points: Sequence[Point], best: dict[str, list[int]], facts: dict[str, Any]) -> str:
    rows = sorted({point.rows for point in points})
    at = {(point.method, point.rows): point for point in points}
    methods = list(dict.fromkeys(point.method for point in points))
    head = "| method | " + " | ".join(f"{n} rows" if n > 1 else "1 row" for n in rows) + " |"
    lines = ["# More rows in flight", "", f"{headline(facts)} {facts['setting']}", ""]
    for title, cell in (
        ("Tokens/s of all rows together, by the clock / predicted", _throughput),
        (
            "Milliseconds a token of one request beside plain rows, by the clock / predicted",
            _latency,
        ),
    ):
        lines += [f"{title}:", "", head, "|" + "---|" * (1 + len(rows))]
        for name in methods:
            lines.append(f"| {name} | " + " | ".join(cell(at[name, n]) for n in rows) + " |")
        lines.append("")
    lines += [
        "Predicted best draft length of the specialists by rows in flight (0 is `none`):", "",
        "| objective | " + " | ".join(str(n + 1) for n in range(len(best["latency"]))) + " |",
        "|" + "---|" * (1 + len(best["latency"])),
    ]  # fmt: skip
    for objective, lengths in best.items():
        lines.append(f"| {objective} | " + " | ".join(map(str, lengths)) + " |")
    return "\n".join(lines) + "\n"


def _throughput(point: Point) -> str:
    predicted = point.predicted_throughput
    return f"{point.throughput:.0f} / " + ("-" if predicted is None else f"{predicted:.0f}")


def _latency(point: Point) -> str:
    predicted = point.predicted_latency
    told = "-" if predicted is None else f"{1e3 * predicted:.2f}"
    return f"{1e3 * point.latency:.2f} / {told}"


def draw(points: Sequence[Point], best: dict[str, list[int]], path: Path) -> None:
    """Points by the clock on the lines predicted, for both questions, and the best draft lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, name in enumerate(dict.fromkeys(point.method for point in points)):
        own = [point for point in points if point.method == name]
        rows = [point.rows for point in own]
        left.plot(rows, [p.throughput for p in own], "o", color=f"C{i}", label=name)
        middle.plot(rows, [1e3 * p.latency for p in own], "o", color=f"C{i}", label=name)
        if name != AUTO:
            left.plot(rows, [p.predicted_throughput for p in own], color=f"C{i}")
            middle.plot(rows, [1e3 * (p.predicted_latency or 0) for p in own], color=f"C{i}")
    left.set(title="all rows use the method", xlabel="rows in flight", ylabel="tokens/s")
    middle.set(title="one request, the others plain", xlabel="rows in flight", ylabel="ms a token")
    left.legend(fontsize=8, title="points clocked, lines predicted")
    for objective, lengths in best.items():
        right.step(range(1, len(lengths) + 1), lengths, where="mid", label=objective)
    right.set(title="best draft length (0: none)", xlabel="rows in flight", ylim=(-0.2, None))
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=Path("paceline.yaml"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--per-task", type=int, default=8, help="prompts of each task")
    parser.add_argument("--skip-per-task", type=int, default=48, help="left to learning")
    parser.add_argument("--requests-per-row", type=int, default=4, help="at least, for throughput")
    parser.add_argument("--draft-lengths", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--profile-seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    console = Console()
    _, timed = demo_prompts(options.skip_per_task, options.per_task)
    with progress(console) as report:
        pace = loaded(options)
        costs = measure_cost_table(pace, report, options.profile_seconds)
        prompts = encode_prompts(pace, timed)
        points, best = measure(pace, costs, prompts, options, report)
    facts: dict[str, Any] = circumstances()
    facts["setting"] = (
        f"Target in {options.dtype}, greedy, {options.per_task} prompts of each task, at most "
        f"{options.max_new_tokens} new tokens; for throughput at least {options.requests_per_row} "
        "requests for each row in flight, prefill included."
    )
    text = markdown(points, best, facts)
    write_atomically(options.out / "load.md", text.encode())
    result = {
        "circumstances": facts,
        "points": [{name: getattr(p, name) for name in Point.__slots__} for p in points],
        "best_lengths": best,
    }
    write_atomically(options.out / "load.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(points, best, options.out / "load.png")
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
