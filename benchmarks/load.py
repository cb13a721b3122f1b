"""At how many rows in flight do shorter drafts, or none, become the better arm? On the bundled models.

    python benchmarks/load.py [--rows 1 2 4 8 16] [--per-task 8] [--dtype bfloat16]

Two figures by the clock, each next to the cost table's prediction. Throughput: a number of rows is kept
in flight and all use the method; tokens per second while all of them are. Latency: one request after
another uses the method while the other rows decode plainly all the time; milliseconds per token of these
requests. `specialist` is the drafter named like a prompt's task, at several draft lengths. Prompts come
task by task, so that most rows in flight share their drafter, as the price for throughput assumes.
`auto` is the policy of the configuration, if there is one that fits it. Predictions are replays of each
arm on the output of `none`.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any

from result_pages import describe_run, page, save, table
from timed_setup import (
    count_steps,
    load_timed_config,
    make_parser,
    parse,
    show_progress,
)

from paceline.assembly import Pace, build, policy_identity
from paceline.bench.profile import measure_cost_table
from paceline.bench.timed import TimedPrompt
from paceline.contracts import AUTO, NONE, join_arm
from paceline.costs import CostTable
from paceline.experiments.by_clock import encode_prompts, replay_arm
from paceline.experiments.demo_prompts import demo_prompts
from paceline.rewards import request_seconds
from paceline.selection import is_policy, load_policy

if TYPE_CHECKING:
    from paceline.contracts import Completion, Progress
    from paceline.costs import Objective
    from paceline.engine import RequestUpdate

SPECIALIST = "specialist"
BACKGROUND_TOKENS = 512  # of each plain row in the background, so that prefills are rare
OBJECTIVES: tuple[Objective, ...] = ("latency", 0.5, "throughput")
ArmOf = Callable[[TimedPrompt], str]  # the arm that a method uses for a prompt


@dataclass(frozen=True, slots=True)
class Point:
    """One method at one number of rows. Throughput in tokens/s, latency in seconds per token."""

    method: str
    rows: int
    throughput: float
    latency: float
    predicted_throughput: float | None  # None where the policy chooses the arms
    predicted_latency: float | None


# --- methods --------------------------------------------------------------------------------------


def methods_of(pace: Pace, lengths: Sequence[int]) -> dict[str, ArmOf]:
    """Return plain decoding, the specialists at each length and their own, lookup, and the policy."""
    drafters = pace.parts.drafters

    def specialist(prompt: TimedPrompt, length: int | None = None) -> str:
        name = prompt.domain if prompt.domain in drafters else NONE
        if name == NONE or length is None or length >= drafters[name].num_draft_tokens:
            return name
        return join_arm(name, length)

    found: dict[str, ArmOf] = {NONE: lambda prompt: NONE}
    for length in lengths:
        found[join_arm(SPECIALIST, length)] = lambda p, length=length: specialist(p, length)  # type: ignore[misc]
    found[SPECIALIST] = specialist
    if "lookup" in drafters:
        found["lookup"] = lambda prompt: "lookup"
    if pace.engine.choose is not None:
        found[AUTO] = lambda prompt: AUTO
    return found


def load_pace(options: argparse.Namespace) -> Pace:
    """Load the models, with room for all rows, and the policy if the configuration has one."""
    config = load_timed_config(options, options.dtype)
    engine = config.engine.model_copy(update={"max_rows": max(options.rows)})
    parts = build(config.model_copy(update={"engine": engine}))
    folder = parts.config.paths.policy
    policy = None
    if is_policy(folder):
        costs = CostTable.load(parts.config.paths.costs)
        policy = load_policy(folder, policy_identity(parts), costs, parts.config.selection)
    return Pace(parts, policy.choose if policy is not None else None)


# --- by the clock ---------------------------------------------------------------------------------


class Load:
    """A number of requests in flight, and the tokens and seconds they take."""

    def __init__(self, pace: Pace, new_tokens: int) -> None:
        self._pace, self._new_tokens = pace, new_tokens
        self._mail: SimpleQueue[RequestUpdate] = SimpleQueue()  # of all requests

    def throughput(self, arm: ArmOf, prompts: Sequence[TimedPrompt], rows: int) -> float:
        """Return tokens per second from the first prefill until fewer rows than `rows` are left."""
        waiting, in_flight = deque(prompts), set[int]()
        tokens, began = 0, perf_counter()
        while True:
            while waiting and len(in_flight) < rows:
                prompt = waiting.popleft()
                in_flight.add(self._submit(arm(prompt), prompt))
            if not waiting and len(in_flight) < rows:
                break
            news = self._mail.get()
            tokens += len(news.new_tokens)
            if news.completion is not None:
                in_flight.discard(news.ticket)
        spent = perf_counter() - began
        self._clear(in_flight)
        return tokens / spent

    def latency(
        self, arm: ArmOf, prompts: Sequence[TimedPrompt], rows: int
    ) -> tuple[float, list[Completion]]:
        """Decode requests one at a time while rows - 1 plain ones run; return their seconds per token
        and their answers.
        """
        plain = cycle(prompts)
        background = {self._submit_plain(next(plain)) for _ in range(rows - 1)}
        started: set[int] = set()
        while started != background:
            news = self._mail.get()
            started |= {news.ticket} if news.new_tokens else set()
        done: list[Completion] = []
        for prompt in prompts:
            own = self._submit(arm(prompt), prompt)
            answered = False
            while not answered:
                news = self._mail.get()
                if news.completion is None:
                    continue
                answered = news.ticket == own
                if answered:
                    done.append(news.completion)
                else:
                    background.remove(news.ticket)
                    background.add(self._submit_plain(next(plain)))
        self._clear(background)
        return sum(c.seconds_total for c in done) / sum(len(c.token_ids) for c in done), done

    def _submit(self, arm: str, prompt: TimedPrompt) -> int:
        return self._send(prompt, drafter=arm, max_new_tokens=self._new_tokens)

    def _submit_plain(self, prompt: TimedPrompt) -> int:
        return self._send(prompt, drafter=NONE, max_new_tokens=BACKGROUND_TOKENS, ignore_eos=True)

    def _send(self, prompt: TimedPrompt, **settings: Any) -> int:
        request = self._pace.request(list(prompt.tokens), generation_config="none", **settings)
        return self._pace.driver.submit(request, self._mail.put)

    def _clear(self, tickets: set[int]) -> None:
        """Cancel requests and wait until their rows are free."""
        for ticket in tickets:
            self._pace.driver.cancel(ticket)
        left = set(tickets)
        while left:
            news = self._mail.get()
            if news.completion is not None:
                left.discard(news.ticket)


# --- predicted ------------------------------------------------------------------------------------


class Predictions:
    """Predicted seconds of arms on prompts whose plain answers are known."""

    def __init__(
        self, pace: Pace, costs: CostTable, answers: dict[str, Sequence[int]], new_tokens: int
    ) -> None:
        self._pace, self._costs = pace, costs
        self._answers, self._new_tokens = answers, new_tokens
        self._rounds: dict[tuple[str, str], Any] = {}

    def per_token(
        self, arm_of: ArmOf, prompts: Sequence[TimedPrompt], rows: int, objective: Objective
    ) -> float:
        """Return seconds per token over all prompts."""
        total = 0.0
        for p in prompts:
            arm, length = arm_of(p), len(p.tokens)
            rounds = self._rounds_of(arm, p)
            total += request_seconds(self._costs.seconds, arm, length, rounds, rows, objective)
        return total / sum(len(self._answers[p.id]) for p in prompts)

    def _rounds_of(self, arm: str, prompt: TimedPrompt) -> Any:
        key = arm, prompt.id
        if key not in self._rounds:
            text = self._answers[prompt.id]
            self._rounds[key] = replay_arm(
                self._pace, arm, prompt.tokens, text, self._new_tokens
            ).table
        return self._rounds[key]


def best_lengths(
    predictions: Predictions, pace: Pace, prompts: Sequence[TimedPrompt], most_rows: int
) -> dict[str, list[int]]:
    """Return objective -> the specialists' best draft length at 1, 2, ... rows; 0 is `none`."""
    tasks = {p.domain for p in prompts}
    lengths = [d.num_draft_tokens for name, d in pace.parts.drafters.items() if name in tasks]
    longest = max(lengths, default=0)
    methods = methods_of(pace, range(1, longest + 1))
    arms = [methods[NONE], *(methods[join_arm(SPECIALIST, k)] for k in range(1, longest + 1))]

    def best(rows: int, objective: Objective) -> int:
        seconds = [predictions.per_token(arm, prompts, rows, objective) for arm in arms]
        return seconds.index(min(seconds))

    return {
        str(objective): [best(rows, objective) for rows in range(1, most_rows + 1)]
        for objective in OBJECTIVES
    }


# --- the whole ------------------------------------------------------------------------------------


def measure(
    pace: Pace, costs: CostTable, prompts: Sequence[TimedPrompt], options: argparse.Namespace,
    report: Progress,
) -> tuple[list[Point], dict[str, list[int]]]:  # fmt: skip
    """Return a point per method and number of rows, and the predicted best draft lengths."""
    load = Load(pace, options.max_new_tokens)
    _, plain = load.latency(lambda prompt: NONE, prompts, 1)  # warms up, and gives the answers
    answers = {p.id: c.token_ids for p, c in zip(prompts, plain, strict=True)}
    predictions = Predictions(pace, costs, answers, options.max_new_tokens)
    methods = methods_of(pace, options.draft_lengths)
    on_method = count_steps(report, "by the clock", len(methods) * len(options.rows))
    points = []
    for rows in options.rows:
        many = list(islice(cycle(prompts), max(len(prompts), options.requests_per_row * rows)))
        many.sort(key=lambda prompt: prompt.domain)
        for name in random.Random(rows).sample(list(methods), len(methods)):
            arm = methods[name]
            throughput, latency = load.throughput(arm, many, rows), load.latency(arm, prompts, rows)
            predicted = None, None
            if name != AUTO:
                per_token = predictions.per_token
                predicted = (
                    1 / per_token(arm, prompts, rows, "throughput"),
                    per_token(arm, prompts, rows, "latency"),
                )
            points.append(Point(name, rows, throughput, latency[0], *predicted))
            on_method()
    points.sort(key=lambda p: (list(methods).index(p.method), p.rows))
    return points, best_lengths(predictions, pace, prompts, max(options.rows))


def markdown(points: Sequence[Point], best: dict[str, list[int]], facts: dict[str, Any]) -> str:
    """Return the page."""
    rows = sorted({point.rows for point in points})
    methods: dict[str, dict[str, str]] = {}
    for point in points:
        cells = methods.setdefault(point.method, {"method": point.method})
        n, latency = point.rows, point.predicted_latency
        predicted = "-", "-"
        if point.predicted_throughput is not None and latency is not None:
            predicted = f"{point.predicted_throughput:.0f}", f"{1e3 * latency:.2f}"
        cells[f"throughput{n}"] = f"{point.throughput:.0f} / {predicted[0]}"
        cells[f"latency{n}"] = f"{1e3 * point.latency:.2f} / {predicted[1]}"
    lines = page("More rows in flight", facts)
    for key, title in (
        ("throughput", "Tokens/s of all rows together"),
        ("latency", "Milliseconds per token of one request among plain rows"),
    ):
        columns = {f"{n} rows" if n > 1 else "1 row": f"{{{key}{n}}}" for n in rows}
        lines += [f"{title}, by the clock / predicted:", ""]
        lines += [*table(methods.values(), {"method": "{method}", **columns}), ""]
    lines += ["Predicted best draft length of the specialists by rows in flight (0 is `none`):", ""]
    columns = {str(n + 1): f"{{lengths[{n}]}}" for n in range(len(best["latency"]))}
    rows_of_best = ({"objective": name, "lengths": lengths} for name, lengths in best.items())
    lines += table(rows_of_best, {"objective": "{objective}", **columns})
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], best: dict[str, list[int]], path: Path) -> None:
    """Draw clocked points on predicted lines, for both figures, and the best draft lengths."""
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
    middle.set(
        title="one request, the others plain", xlabel="rows in flight", ylabel="ms per token"
    )
    left.legend(fontsize=8, title="points clocked, lines predicted")
    for objective, lengths in best.items():
        right.step(range(1, len(lengths) + 1), lengths, where="mid", label=objective)
    right.set(title="best draft length (0: none)", xlabel="rows in flight", ylim=(-0.2, None))
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Profile the machine, then time every method at every number of rows."""
    parser = make_parser(__doc__, per_task=8)
    parser.add_argument("--skip-per-task", type=int, default=48, help="prompts left for learning")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests-per-row", type=int, default=4, help="at least, for throughput")
    parser.add_argument("--draft-lengths", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--profile-seconds", type=float, default=10.0)
    options = parse(parser)
    _, timed = demo_prompts(options.skip_per_task, options.per_task)
    with show_progress() as report:
        pace = load_pace(options)
        costs = measure_cost_table(pace, report, options.profile_seconds)
        points, best = measure(pace, costs, encode_prompts(pace, timed), options, report)
    facts = describe_run(
        f"Target in {options.dtype}, greedy, {options.per_task} prompts of each task, at most "
        f"{options.max_new_tokens} new tokens; for throughput at least {options.requests_per_row} "
        "requests for each row in flight, prefill included."
    )
    result = {
        "circumstances": facts,
        "points": [{name: getattr(p, name) for name in Point.__slots__} for p in points],
        "best_lengths": best,
    }
    save(options.out, "load", markdown(points, best, facts), result)
    draw(points, best, options.out / "load.png")


if __name__ == "__main__":
    main()
