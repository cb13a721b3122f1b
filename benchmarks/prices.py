"""Is the cost table right? Predicted against clocked seconds on the bundled models.

    python benchmarks/prices.py [--per-task 8] [--dtypes bfloat16 float32] [--repeats 3]

The machine is profiled, then every arm decodes every prompt by the clock: batch 1, one process,
interleaved, seconds end to end. Then the machine is profiled again: the prices are the means of both
tables. Every arm's drafter is replayed on the text that the arm itself wrote, and the table prices the
rounds. This tests only the prices: neither acceptance nor the texts, which in bfloat16 may differ
between arms. Arms are the configuration's drafters at their own length and at --draft-lengths, and a
cascade of the drafters --cascade.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from agreement import Ranking, bias, median_bias, median_error, ranking
from drift import drift_between, mean_of
from result_pages import describe_run, page, save, table
from timed_setup import (
    load_timed_config,
    make_parser,
    parse,
    show_progress,
)

from paceline.assembly import Pace, build
from paceline.bench.profile import measure_cost_table
from paceline.bench.timed import TimedPrompt
from paceline.config import DrafterSection
from paceline.contracts import NONE, join_arm, split_arm
from paceline.costs.pricing import prompt_seconds
from paceline.experiments.by_clock import (
    RecordingMethods,
    encode_prompts,
    replay_arm,
    time_methods,
)
from paceline.experiments.demo_prompts import demo_prompts
from paceline.rewards import request_seconds

if TYPE_CHECKING:
    from paceline.config import Config
    from paceline.contracts import Completion, Progress
    from paceline.costs import CostTable
    from paceline.store.records import ReplayedDrafter

PARTS = ("prefill", "draft", "verify", "host")


@dataclass(frozen=True, slots=True)
class Run:
    """One arm on one prompt. Parts are of the last run, seconds of the median run."""

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
    """Return `none`, and every drafter at its own length and at the shorter lengths it can draft."""
    arms = []
    for name, drafter in pace.parts.drafters.items():
        arms.append(name)
        if drafter.nests:
            arms += [join_arm(name, k) for k in lengths if k < drafter.num_draft_tokens]
    return arms


def with_cascade(config: Config, parts: Sequence[str]) -> Config:
    """Return the configuration with a cascade of these of its drafters; unchanged without parts."""
    if not parts:
        return config
    section = DrafterSection(kind="cascade", settings={"parts": list(parts)})
    drafters = {**config.drafters, "+".join(parts): section}
    return config.model_copy(update={"drafters": drafters})


def parts_of(
    costs: CostTable, arm: str, num_prompt: int, replayed: ReplayedDrafter
) -> dict[str, float]:
    """Return the predicted seconds by the engine's own parts."""
    name = split_arm(arm)[0]
    rounds = replayed.table
    drafted, accepted = rounds.T
    proposed = drafted if replayed.proposed is None else replayed.proposed
    context = num_prompt + np.cumsum(accepted + 1) - (accepted + 1)
    prefill, begun = (
        float(prompt_seconds(costs.seconds, d, np.array([num_prompt]))[0]) for d in (NONE, name)
    )
    draft = 0.0 if name == NONE else float(costs.seconds(name, "propose", proposed, context).sum())
    return {
        "prefill": prefill,
        "draft": begun - prefill + draft,
        "verify": float(costs.seconds("target", "forward", 1 + drafted, context).sum()),
        "host": costs.seconds("engine", "round", 0) * len(rounds),
    }


def compare(
    pace: Pace, arms: Sequence[str], prompts: Sequence[TimedPrompt],
    options: argparse.Namespace, dtype: str, report: Progress,
) -> tuple[list[Run], float]:  # fmt: skip
    """Return a run per arm and prompt, predicted and by the clock, and the drift of the machine."""

    def profile(when: str) -> CostTable:
        return measure_cost_table(
            pace,
            lambda stage, done, total: report(f"{dtype}, {stage} {when}", done, total),
            options.profile_seconds,
        )

    before = profile("before")
    for drafter in pace.parts.drafters.values():
        drafter.price(before)
    new_tokens, repeats = options.max_new_tokens, options.repeats
    recorder = RecordingMethods(pace, max_new_tokens=new_tokens)
    methods = {arm: recorder.method(arm) for arm in arms}
    timings = time_methods(methods, prompts, repeats, f"{dtype}, by the clock", report)
    seconds = {(timing.method, timing.prompt): timing.seconds for timing in timings}
    after = profile("after")
    costs = mean_of(before, after)
    runs = []
    for number, prompt in enumerate(prompts, start=1):
        for arm in arms:
            completion = recorder.completions[arm, prompt.tokens]
            replayed = replay_arm(pace, arm, prompt.tokens, completion.token_ids, new_tokens)
            num_prompt, proposed = len(prompt.tokens), replayed.proposed
            runs.append(
                Run(
                    dtype=dtype,
                    task=prompt.domain,
                    prompt=prompt.id,
                    arm=arm,
                    tokens=len(completion.token_ids),
                    rounds=len(replayed.table),
                    predicted=request_seconds(
                        costs.seconds, arm, num_prompt, replayed.table, proposed=proposed
                    ),
                    clocked=seconds[arm, prompt.id],
                    predicted_parts=parts_of(costs, arm, num_prompt, replayed),
                    clocked_parts=clocked_parts(completion),
                )
            )
        report(f"{dtype}, replay and price", number, len(prompts))
    return runs, drift_between(before, after)


def clocked_parts(completion: Completion) -> dict[str, float]:
    """Return the clocked seconds by the engine's own parts."""
    own = completion.seconds
    parts = {"prefill": own.prefill, "draft": own.draft, "verify": own.verify}
    return {**parts, "host": completion.seconds_total - sum(parts.values())}


# --- summaries and pages --------------------------------------------------------------------------


def pairs_of(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Return (predicted, clocked) per run."""
    return [(run.predicted, run.clocked) for run in runs]


def ranked(runs: Sequence[Run]) -> Ranking:
    """Rank the arms by seconds per token on these runs' prompts, predicted against clocked."""
    predicted: dict[str, float] = {}
    clocked: dict[str, float] = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        tokens = sum(run.tokens for run in own)
        predicted[arm] = sum(run.predicted for run in own) / tokens
        clocked[arm] = sum(run.clocked for run in own) / tokens
    return ranking(predicted, clocked)


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Return errors by arm and in all, and the ranking by task, of one dtype."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    by_task = {task: ranked([run for run in runs if run.task == task]) for task in tasks}
    total = sum(by_task.values(), start=Ranking(0, 0))
    by_arm = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        by_arm[arm] = {
            "median_error": median_error(pairs_of(own)),
            "bias": bias(pairs_of(own)),
            "median_bias": median_bias(pairs_of(own)),
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
        "median_bias": median_bias(pairs_of(runs)),
        "runs": len(runs),
        "arms": by_arm,
        "ranking": {task: _ranking_facts(found) for task, found in by_task.items()},
        "ranking_of_all": _ranking_facts(total),
    }


def _ranking_facts(found: Ranking) -> dict[str, float]:
    return {**asdict(found), "share_right": found.share_right, "tau": found.tau}


def markdown(found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the page."""
    lines = page("Predicted against clocked seconds", facts)
    lines += table(
        ({"dtype": dtype, **own} for dtype, own in found.items()),
        {
            "dtype": "{dtype}",
            "runs": "{runs}",
            "median absolute error": "{median_error:.1%}",
            "bias": "{bias:+.1%}",
            "median signed error": "{median_bias:+.1%}",
            "drift of the machine": "{drift:+.1%}",
            "pairs of arms told apart": "{ranking_of_all[pairs]}",
            "of them in order": "{ranking_of_all[right]}",
            "Kendall's tau": "{ranking_of_all[tau]:.2f}",
        },
    )
    lines += [
        "",
        "Pairs are counted within a task, where one arm is predicted to be at least 5% slower than the "
        "other: " + "; ".join(_by_task(dtype, own) for dtype, own in found.items()) + ".",
        "",
        "The bias compares sums of seconds, the median signed error single requests, so that a few that "
        "were interrupted do not decide it. By arm; a part is its milliseconds per prompt, predicted / "
        "clocked. The predicted prefill includes the host's work once per request, the predicted draft "
        "the seconds that it adds to verification.",
        "",
    ]
    part = "{{milliseconds[{0}][0]:.1f}} / {{milliseconds[{0}][1]:.1f}}"
    lines += table(
        (
            {"dtype": d, "arm": arm, **row}
            for d, own in found.items()
            for arm, row in own["arms"].items()
        ),
        {
            "dtype": "{dtype}",
            "arm": "{arm}",
            "median absolute error": "{median_error:.1%}",
            "bias": "{bias:+.1%}",
            "median signed error": "{median_bias:+.1%}",
            **{name: part.format(name) for name in PARTS},
        },
    )
    return "\n".join(lines) + "\n"


def _by_task(dtype: str, own: dict[str, Any]) -> str:
    counts = (f"{task} {r['right']} of {r['pairs']}" for task, r in own["ranking"].items())
    return f"{dtype}: {', '.join(counts)}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw every run as a point, one panel per dtype, with the diagonal and 10% on either side."""
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
        axes.set(xscale="log", yscale="log", title=f"{dtype}: seconds per request")
        axes.set(xlabel="by the clock", ylabel="predicted")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Profile, time and replay every arm at every dtype."""
    parser = make_parser(__doc__, per_task=8)
    parser.add_argument("--skip-per-task", type=int, default=48, help="prompts left for learning")
    parser.add_argument("--draft-lengths", type=int, nargs="*", default=[1, 2])
    parser.add_argument(
        "--cascade",
        nargs="*",
        default=["suffix", "general"],
        help="drafters that are the parts of one more arm",
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile-seconds", type=float, default=10.0)
    options = parse(parser)
    _, timed = demo_prompts(options.skip_per_task, options.per_task)
    runs: list[Run] = []
    drifts: dict[str, float] = {}
    with show_progress() as report:
        for dtype in options.dtypes:
            config = with_cascade(load_timed_config(options, dtype), options.cascade)
            pace = Pace(build(config))
            arms = arms_of(pace, options.draft_lengths)
            prompts = encode_prompts(pace, timed)
            own, drifts[dtype] = compare(pace, arms, prompts, options, dtype, report)
            runs += own
    facts = describe_run(
        f"Greedy, batch 1, {options.per_task} prompts of each task, at most {options.max_new_tokens} "
        f"new tokens, median of {options.repeats} interleaved runs, seconds end to end; a profile of "
        f"{options.profile_seconds:g} s before the runs of each dtype and one after."
    )
    found = {
        d: {**summarise([run for run in runs if run.dtype == d]), "drift": drifts[d]}
        for d in options.dtypes
    }
    result = {"circumstances": facts, **found, "by_run": [asdict(run) for run in runs]}
    save(options.out, "prices", markdown(found, facts), result)
    draw(runs, options.out / "prices.png")


if __name__ == "__main__":
    main()
