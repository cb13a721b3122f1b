"""Does the price table tell the truth? Predicted against clocked seconds on the bundled models.

    python benchmarks/prices.py [--per-task 8] [--dtypes bfloat16 float32] [--repeats 3]

The machine is profiled, then every arm decodes every prompt by the clock: batch 1, one process,
interleaved, seconds end to end. Every arm's drafter is then replayed on the text that the arm itself
wrote, and the rounds are priced by the table. So nothing is tested but the prices: not what is
accepted, and not the texts, which in bfloat16 may differ from arm to arm. Arms are the configuration's
drafters at their own length and at --draft-lengths.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from agreement import Ranking, bias, median_error, ranking
from rich.console import Console

from paceline.assembly import Pace, build
from paceline.bench.circumstances import circumstances, headline
from paceline.bench.profile import measure_cost_table
from paceline.bench.timed import TimedPrompt
from paceline.cli.options import configured
from paceline.cli.progress import progress
from paceline.contracts import NONE, Completion, join_arm, split_arm
from paceline.costs.pricing import draft_seconds, prompt_seconds, start_seconds
from paceline.experiments.by_clock import (
    RecordingMethods,
    encode_prompts,
    replay_arm,
    time_methods,
    without_prefixes,
)
from paceline.experiments.demo_prompts import demo_prompts
from paceline.files import write_atomically
from paceline.rewards import request_seconds

if TYPE_CHECKING:
    from paceline.contracts import Progress
    from paceline.costs import CostTable

PARTS = ("prefill", "draft", "verify", "host")


@dataclass(frozen=True, slots=True)
class Run:
    """One arm on one prompt. Parts are those of the last run; seconds are the median run's."""

    dtype: str
    task: str
    prompt: str
    arm: str
    tokens: int
    rounds: int
    predicted: float
    clocked: float
    predicted_parts: dict[str, float]
    clocked_parts: dict[str, float]


def arms_of(pace: Pace, lengths: Sequence[int]) -> list[str]:
    """`none`, and every drafter at its own length and at those shorter ones that it can draft."""
    arms = []
    for name, drafter in pace.parts.drafters.items():
        arms.append(name)
        if drafter.nests:
            arms += [join_arm(name, k) for k in lengths if k < drafter.num_draft_tokens]
    return arms


def clock(
    pace: Pace,
    arms: Sequence[str],
    prompts: Sequence[TimedPrompt],
    new_tokens: int,
    repeats: int,
    label: str,
    report: Progress,
) -> dict[tuple[str, str], tuple[float, Completion]]:
    """(arm, prompt) -> seconds of the median run, and the last run's completion."""
    recorder = RecordingMethods(pace, max_new_tokens=new_tokens)
    methods = {arm: recorder.method(arm) for arm in arms}
    timings = time_methods(methods, prompts, repeats, label, report)
    of = {p.id: p.tokens for p in prompts}
    return {
        (t.method, t.prompt): (t.seconds, recorder.completions[t.method, of[t.prompt]])
        for t in timings
    }


def parts_of(costs: CostTable, arm: str, num_prompt: int, rounds: Any) -> dict[str, float]:
    """The predicted seconds by the engine's own parts."""
    name = split_arm(arm)[0]
    drafted, accepted = rounds.T
    context = num_prompt + np.cumsum(accepted + 1) - (accepted + 1)
    length = np.array(num_prompt)
    draft = draft_seconds(costs.seconds, name, drafted, context).sum()
    return {
        "prefill": float(prompt_seconds(costs.seconds, NONE, length)),
        "draft": float(start_seconds(costs.seconds, name, length) + draft),
        "verify": float(costs.seconds("target", "forward", 1 + drafted, context).sum()),
        "host": costs.seconds("engine", "round", 0) * len(rounds),
    }


def compare(
    pace: Pace,
    costs: CostTable,
    arms: Sequence[str],
    prompts: Sequence[TimedPrompt],
    options: argparse.Namespace,
    dtype: str,
    report: Progress,
) -> list[Run]:
    """Every arm on every prompt, predicted and by the clock."""
    new_tokens, label = options.max_new_tokens, f"{dtype}, by the clock"
    clocked = clock(pace, arms, prompts, new_tokens, options.repeats, label, report)
    runs = []
    for number, prompt in enumerate(prompts, start=1):
        for arm in arms:
            seconds, done = clocked[arm, prompt.id]
            rounds = replay_arm(pace, arm, prompt.tokens, done.token_ids, new_tokens)
            own = done.seconds
            measured = {"prefill": own.prefill, "draft": own.draft, "verify": own.verify}
            measured["host"] = done.seconds_total - sum(measured.values())
            predicted = request_seconds(costs.seconds, arm, len(prompt.tokens), rounds)
            parts = parts_of(costs, arm, len(prompt.tokens), rounds)
            runs.append(
                Run(
                    dtype,
                    prompt.domain,
                    prompt.id,
                    arm,
                    len(done.token_ids),
                    len(rounds),
                    predicted,
                    seconds,
                    parts,
                    measured,
                )
            )
        report(f"{dtype}, replay and price", number, len(prompts))
    return runs


# --- what is said of it ---------------------------------------------------------------------------


def pairs_of(runs: Sequence[Run]) -> list[tuple[float, float]]:
    return [(run.predicted, run.clocked) for run in runs]


def ranked(runs: Sequence[Run]) -> Ranking:
    """Seconds per token of the arms on these runs' prompts, predicted against clocked."""
    predicted: dict[str, float] = {}
    clocked: dict[str, float] = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        tokens = sum(run.tokens for run in own)
        predicted[arm] = sum(run.predicted for run in own) / tokens
        clocked[arm] = sum(run.clocked for run in own) / tokens
    return ranking(predicted, clocked)


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Errors by arm and in all, ranking by task, of one dtype."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    by_task = {task: ranked([run for run in runs if run.task == task]) for task in tasks}
    total = sum(by_task.values(), start=Ranking(0, 0))
    by_arm = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        by_arm[arm] = {
            "median_error": median_error(pairs_of(own)),
            "bias": bias(pairs_of(own)),
            "milliseconds": {
                part: [
                    1e3 * sum(parts[part] for parts in side) / len(own)
                    for side in ([r.predicted_parts for r in own], [r.clocked_parts for r in own])
                ]
                for part in PARTS
            },
        }
    return {
        "median_error": median_error(pairs_of(runs)),
        "bias": bias(pairs_of(runs)),
        "runs": len(runs),
        "arms": by_arm,
        "ranking": {task: _told(found) for task, found in by_task.items()},
        "ranking_of_all": _told(total),
    }


def _told(found: Ranking) -> dict[str, float]:
    return {**asdict(found), "share_right": found.share_right, "tau": found.tau}


def markdown(found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# Predicted against clocked seconds",
        "",
        f"{headline(facts)} {facts['setting']}",
        "",
        "| dtype | runs | median absolute error | bias | pairs of arms told apart | of them in order "
        "| Kendall's tau |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype, own in found.items():
        told = own["ranking_of_all"]
        lines.append(
            f"| {dtype} | {own['runs']} | {own['median_error']:.1%} | {own['bias']:+.1%} | "
            f"{told['pairs']} | {told['right']} | {told['tau']:.2f} |"
        )
    lines += [
        "",
        "Pairs are counted within a task, where one arm is predicted to be at least 5% slower than the "
        "other: " + "; ".join(_by_task(dtype, own) for dtype, own in found.items()) + ".",
        "",
        "By arm; a part is its milliseconds a prompt, predicted / clocked.",
        "",
        "| dtype | arm | median absolute error | bias | " + " | ".join(PARTS) + " |",
        "|" + "---|" * (4 + len(PARTS)),
    ]
    for dtype, own in found.items():
        for arm, row in own["arms"].items():
            parts = " | ".join("{:.1f} / {:.1f}".format(*row["milliseconds"][p]) for p in PARTS)
            lines.append(
                f"| {dtype} | {arm} | {row['median_error']:.1%} | {row['bias']:+.1%} | {parts} |"
            )
    return "\n".join(lines) + "\n"


def _by_task(dtype: str, own: dict[str, Any]) -> str:
    told = (f"{task} {r['right']} of {r['pairs']}" for task, r in own["ranking"].items())
    return f"{dtype}: {', '.join(told)}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Every run as a point, one panel a dtype, with the diagonal and 10% on either side."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(run.dtype for run in runs))
    arms = list(dict.fromkeys(run.arm for run in runs))
    drafters = list(dict.fromkeys(split_arm(arm)[0] for arm in arms))
    figure = Figure(figsize=(5.4 * len(dtypes), 5.2), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        own = [run for run in runs if run.dtype == dtype]
        ends = np.array([min(r.clocked for r in own) * 0.9, max(r.clocked for r in own) * 1.1])
        axes.plot(ends, ends, color="0.4", linewidth=0.8)
        axes.fill_between(ends, ends * 0.9, ends * 1.1, color="0.9", label="within 10%")
        for i, name in enumerate(drafters):
            points = [run for run in own if split_arm(run.arm)[0] == name]
            x, y = [run.clocked for run in points], [run.predicted for run in points]
            axes.plot(x, y, ".", color=f"C{i}", label=name, markersize=5)
        axes.set(xscale="log", yscale="log", title=f"{dtype}: seconds a request")
        axes.set(xlabel="by the clock", ylabel="predicted")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=Path("paceline.yaml"))
    parser.add_argument("--per-task", type=int, default=8, help="timed prompts of each task")
    parser.add_argument("--skip-per-task", type=int, default=48, help="left to learning")
    parser.add_argument("--draft-lengths", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--profile-seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    console = Console()
    _, timed = demo_prompts(options.skip_per_task, options.per_task)
    runs: list[Run] = []
    with progress(console) as report:
        for dtype in options.dtypes:
            config = configured(options.config, dtype=dtype, threads=options.threads)
            pace = Pace(build(without_prefixes(config)))
            costs = measure_cost_table(
                pace,
                lambda stage, done, total, dtype=dtype: report(f"{dtype}, {stage}", done, total),
                options.profile_seconds,
            )
            prompts = encode_prompts(pace, timed)
            arms = arms_of(pace, options.draft_lengths)
            runs += compare(pace, costs, arms, prompts, options, dtype, report)
    facts: dict[str, Any] = circumstances()
    facts["setting"] = (
        f"Greedy, batch 1, {options.per_task} prompts of each task, at most {options.max_new_tokens} "
        f"new tokens, median of {options.repeats} interleaved runs, seconds end to end; one profile of "
        f"{options.profile_seconds:g} s before the runs of each dtype."
    )
    found = {d: summarise([run for run in runs if run.dtype == d]) for d in options.dtypes}
    text = markdown(found, facts)
    write_atomically(options.out / "prices.md", text.encode())
    result = {"circumstances": facts, **found, "by_run": [asdict(run) for run in runs]}
    write_atomically(options.out / "prices.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(runs, options.out / "prices.png")
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
