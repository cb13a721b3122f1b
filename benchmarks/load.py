"""How fast is `auto` with 1 to 16 rows in flight, next to plain decoding and to fixed arms?

    python benchmarks/load.py [--rows 1 2 4 8 16] [--turns 6] [--dtype bfloat16] [--uncut]

Collects, profiles and learns first, in a temporary folder. Then every turn decodes one queue of prompts
of all tasks, mixed, with every method in random order: `--requests-per-row` requests for each row in
flight, all submitted at once, prefill and choice included. The methods:

    none          plain decoding
    suffix        a lookup in the text so far (`--arms` names other fixed arms)
    best model    the draft model, at a draft length, that is predicted to take the least time for the
                  collected prompts at this number of rows
    auto          the learned policy's choice for each request

Drafts of several rows are cut to the shared budget; `--uncut` also runs each method without it. A ratio
is one of tokens per second on the same prompts; its 95% interval is a bootstrap over turns. The best
fixed arm is the fastest one on the turns themselves, which favours it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from result_pages import count_drafts, describe_run, page, save, table
from timed_setup import (
    count_steps,
    load_prompts,
    load_timed_config,
    make_parser,
    parse,
    show_progress,
)

from paceline.assembly import Pace, Parts
from paceline.contracts import AUTO, NONE, split_arm
from paceline.costs import RoundSeconds
from paceline.drafting.catalog import arms_of
from paceline.drafting.draft_model import DraftModel
from paceline.experiments.by_clock import encode_prompts
from paceline.intervals import Interval
from paceline.learning.dataset import build_dataset
from paceline.learning.evaluation.bootstrap import interval, resample
from paceline.plotting import import_figure
from paceline.verbs.pipeline import in_folder, load_priced, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.bench.timed import TimedPrompt
    from paceline.contracts import Completion, Progress
    from paceline.verbs.pipeline import Prepared

BEST_MODEL = "best model"
UNCUT = ", uncut"


@dataclass(slots=True)
class Method:
    """One way to decode at one number of rows, and its turns."""

    name: str
    rows: int
    arm: str
    pace: Pace
    seconds: list[float] = field(default_factory=list)  # per turn
    tokens: list[int] = field(default_factory=list)  # per turn
    completions: list[Completion] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all turns over their seconds."""
        return sum(self.tokens) / sum(self.seconds)

    def run(self, prompts: Sequence[TimedPrompt], max_new_tokens: int) -> None:
        """Decode one turn's prompts, all submitted at once."""
        requests = [
            self.pace.request(
                list(prompt.tokens), id=str(i), drafter=self.arm, max_new_tokens=max_new_tokens,
                generation_config="none",
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        began = perf_counter()
        done = list(self.pace.stream(requests))
        self.seconds.append(perf_counter() - began)
        self.tokens.append(sum(len(c.token_ids) for c in done))
        self.completions += done


# --- methods --------------------------------------------------------------------------------------


def best_models(prepared: Prepared, rows: Sequence[int]) -> dict[int, str]:
    """Return for each number of rows the draft model's arm with the least predicted time."""
    parts = prepared.pace.parts
    models = [n for n, d in parts.drafters.items() if isinstance(d, DraftModel)]
    arms = [arm for arm in arms_of(parts.config) if split_arm(arm)[0] in models]
    if not arms:
        return {}
    priced = load_priced(parts.config)
    data, _ = build_dataset(priced.prompts, [NONE, *arms], prepared.costs, parts.config.learning)
    totals = {n: data.seconds_for(n).sum(axis=0)[1:] for n in rows}
    return {n: arms[int(total.argmin())] for n, total in totals.items()}


def make_methods(
    prepared: Prepared, rows: int, fixed: Sequence[str], model: str | None, with_uncut: bool
) -> list[Method]:
    """Return the methods at a number of rows, each with an engine of that many rows."""
    policy = prepared.learned.policy
    arms = {NONE: NONE, **{arm: arm for arm in fixed}}
    arms |= {} if model is None else {BEST_MODEL: model}
    arms[AUTO] = AUTO
    p = prepared.pace.parts
    engine = p.config.engine.model_copy(update={"max_rows": rows})
    config = p.config.model_copy(update={"engine": engine})

    def pace(round_seconds: RoundSeconds | None) -> Pace:
        parts = Parts(config, p.target, p.tokenizer, p.vocabulary, p.drafters)
        return Pace(parts, policy.choose, round_seconds=round_seconds)

    # an engine of one row cuts nothing
    cut = pace(RoundSeconds(prepared.costs) if rows > 1 else None)
    methods = [Method(name, rows, arm, cut) for name, arm in arms.items()]
    if with_uncut and rows > 1:
        whole = pace(None)
        others = [(name, arm) for name, arm in arms.items() if name != NONE]
        methods += [Method(name + UNCUT, rows, arm, whole) for name, arm in others]
    return methods


# --- by the clock ---------------------------------------------------------------------------------


def measure(
    methods: Mapping[int, Sequence[Method]],
    prompts: Sequence[TimedPrompt],
    options: argparse.Namespace,
    report: Progress,
) -> None:
    """Run every turn of every number of rows with its methods, in random order."""
    order = random.Random(0)
    total = sum(map(len, methods.values())) * options.turns
    on_run = count_steps(report, "by the clock", total)
    for own in methods.values():  # compiles, and reads every drafter's weights
        for method in own:
            method.run(prompts[: method.rows], 8)
            method.seconds.clear()
            method.tokens.clear()
            method.completions.clear()
    queues = {rows: cycle(prompts) for rows in methods}
    for _ in range(options.turns):
        for rows in order.sample(list(methods), len(methods)):
            queue = list(islice(queues[rows], options.requests_per_row * rows))
            for method in order.sample(list(methods[rows]), len(methods[rows])):
                method.run(queue, options.max_new_tokens)
                on_run()


def ratio(method: Method, other: Method) -> Interval:
    """Return the method's tokens per second over the other's, paired by turn."""
    columns = np.array([method.tokens, method.seconds, other.tokens, other.seconds]).T  # [T, 4]
    sampled = resample(columns, [""] * len(columns), seed=0)

    def ratios(sums: np.ndarray) -> np.ndarray:  # [..., 4]
        return np.asarray(sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3]))

    return interval(float(ratios(sampled.sums)[0]), ratios(sampled.drawn)[:, 0])


def summarize(methods: Sequence[Method]) -> dict[str, Any]:
    """Return the figures of one number of rows."""
    by_name = {method.name: method for method in methods}
    auto = by_name[AUTO]
    fixed = [m for m in methods if m.arm not in (NONE, AUTO) and UNCUT not in m.name]
    best = max([by_name[NONE], *fixed], key=lambda method: method.tokens_per_second)
    ratios = {
        "auto / none": ratio(auto, by_name[NONE]),
        "auto / best fixed": ratio(auto, best),
        **{
            f"{m.name.removesuffix(UNCUT)}: cut / uncut": ratio(by_name[m.name.removesuffix(UNCUT)], m)
            for m in methods
            if UNCUT in m.name
        },
    }  # fmt: skip
    return {
        "rows": auto.rows,
        "best_fixed": best.name,
        "best_model": by_name[BEST_MODEL].arm if BEST_MODEL in by_name else None,
        "tokens_per_second": {m.name: m.tokens_per_second for m in methods},
        "rounds_drafted_accepted": {m.name: count_drafts(m.completions) for m in methods},
        "ratios": {name: [r.value, r.low, r.high] for name, r in ratios.items()},
    }


# --- the page -------------------------------------------------------------------------------------


def markdown(found: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the page."""
    lines = page("More rows in flight", facts)

    def rows_of(key: str, template: str) -> list[dict[str, Any]]:
        names = list(dict.fromkeys(name for one in found for name in one[key]))
        cells = [
            {
                one["rows"]: template.format(one[key][name]) if name in one[key] else "-"
                for one in found
            }
            for name in names
        ]
        return [{"name": name, "cells": own} for name, own in zip(names, cells, strict=True)]

    columns = {
        f"{one['rows']} rows" if one["rows"] > 1 else "1 row": f"{{cells[{one['rows']}]}}"
        for one in found
    }
    lines += ["Tokens/s of all rows together:", ""]
    lines += table(rows_of("tokens_per_second", "{:.0f}"), {"method": "{name}", **columns})
    lines += ["", "Ratios of tokens/s with 95% intervals:", ""]
    lines += table(
        rows_of("ratios", "{0[0]:.3f} ({0[1]:.3f} to {0[2]:.3f})"), {"ratio": "{name}", **columns}
    )
    lines += ["", "Rounds, drafted (verified) and accepted tokens:", ""]
    lines += table(
        rows_of("rounds_drafted_accepted", "{0[0]}, {0[1]}, {0[2]}"),
        {"method": "{name}", **columns},
    )
    lines += ["", "The best fixed arm, and the best model by prediction:", ""]
    lines += [
        f"- {one['rows']} rows: {one['best_fixed']}; {one['best_model'] or 'no draft model'}"
        for one in found
    ]
    return "\n".join(lines) + "\n"


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw tokens/s of every method, and the ratios of `auto`."""
    figure = import_figure()(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [one["rows"] for one in found]
    for name in found[-1]["tokens_per_second"]:
        own = [one["tokens_per_second"].get(name) for one in found]
        left.plot(rows, [np.nan if x is None else x for x in own], "o-", label=name)
    left.set(title="all rows together", xlabel="rows in flight", ylabel="tokens/s")
    left.legend(fontsize=8)
    for name in ("auto / none", "auto / best fixed"):
        values = np.array([one["ratios"][name] for one in found])  # [rows, 3]
        spread = np.abs(values[:, 1:] - values[:, :1]).T
        right.errorbar(rows, values[:, 0], yerr=spread, fmt="o-", capsize=3, label=name)
    right.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
    right.set(title="ratios with 95% intervals", xlabel="rows in flight")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prepare a policy, then time every method at every number of rows."""
    parser = make_parser(__doc__, per_task=40)
    parser.add_argument("--collect", type=int, default=24, help="prompts per task to learn from")
    parser.add_argument("--data", type=Path, help="folder of JSONL files, else the demo's prompts")
    parser.add_argument("--work", type=Path, help="keeps collection and costs between runs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--arms", nargs="*", default=["suffix"], help="fixed arms")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--requests-per-row", type=int, default=4)
    parser.add_argument("--uncut", action="store_true", help="also without the shared budget")
    parser.add_argument("--dtype", default="bfloat16")
    options = parse(parser)
    if options.turns < 2:
        parser.error("--turns must be at least 2: intervals are over turns")
    collected, timed = load_prompts(options.collect, options.per_task, options.data)
    with tempfile.TemporaryDirectory() as folder, show_progress() as report:
        config = in_folder(load_timed_config(options, options.dtype), options.work or Path(folder))
        engine = config.engine.model_copy(update={"max_rows": max(options.rows)})
        config = config.model_copy(update={"engine": engine})
        prepared = prepare(config, collected, options.max_new_tokens, on_progress=report)
        models = best_models(prepared, options.rows)
        methods = {
            rows: make_methods(prepared, rows, options.arms, models.get(rows), options.uncut)
            for rows in options.rows
        }
        prompts = encode_prompts(prepared.pace, timed)
        random.Random(0).shuffle(prompts)
        measure(methods, prompts, options, report)
        found = [summarize(own) for own in methods.values()]
    facts = describe_run(
        f"Target in {options.dtype}, greedy, {len(prompts)} prompts of all tasks, at most "
        f"{options.max_new_tokens} new tokens; {options.turns} turns of {options.requests_per_row} "
        f"requests for each row in flight; policy {prepared.learned.policy.id}, objective "
        f"{config.learning.objective}."
    )
    save(options.out, "load", markdown(found, facts), {"circumstances": facts, "loads": found})
    draw(found, options.out / "load.png")


if __name__ == "__main__":
    main()
