"""paceline against transformers' own generate, on the bundled models, one process, interleaved.

    python benchmarks/versus_transformers.py [--per-task 10] [--repeats 3] [--max-new-tokens 128]

Batch 1, greedy, same weights, same prompts, seconds from prompt tokens to output tokens. Four pairs
at float32 and at bfloat16: `none` against `generate`; `draft_model` against
`generate(assistant_model=...)` with the same drafter, where transformers gets the better of its default
draft length and ours; `prompt_lookup` against `prompt_lookup_num_tokens`; `auto` against all. The
policy of `auto` is learned here, on prompts that are not timed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from result_pages import by_task, describe_run, page, save, speeds, table
from timed_setup import (
    fix_draft_length,
    generate,
    load_timed_config,
    make_parser,
    parse,
    show_progress,
)
from transformers import AutoModelForCausalLM

from paceline.assembly import Pace
from paceline.bench.timed import Method, Timing
from paceline.contracts import AUTO, NONE, join_arm
from paceline.experiments.by_clock import RecordingMethods, encode_prompts, time_methods
from paceline.experiments.demo_prompts import demo_prompts
from paceline.verbs.pipeline import in_folder, prepare

GENERATE = "transformers generate"
ASSISTED = "transformers assistant_model"
ASSISTED_SAME_K = "transformers assistant_model, our length"
LOOKUP = "transformers prompt_lookup_num_tokens"
DRAFTER, DRAFT_LENGTH = "general", 4
DRAFT_ARM = join_arm(DRAFTER, DRAFT_LENGTH)
LOOKUP_ARM = "lookup"
SUFFIX_ARM = "suffix"  # has no counterpart; often the best single arm


def transformers_methods(pace: Pace, dtype: torch.dtype, max_new_tokens: int) -> dict[str, Method]:
    """Return transformers' counterparts, with their own copies of the models."""
    config = pace.parts.config

    def load(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    target = load(config.target.model)
    drafter_settings = config.drafters[DRAFTER].settings
    default, same = load(drafter_settings["model"]), load(drafter_settings["model"])
    fix_draft_length(same, DRAFT_LENGTH)
    lookup_tokens = config.drafters[LOOKUP_ARM].settings["num_draft_tokens"]

    def method(**extra: Any) -> Method:
        return lambda tokens: generate(target, tokens, max_new_tokens, **extra)

    return {
        GENERATE: method(),
        ASSISTED: method(assistant_model=default),
        ASSISTED_SAME_K: method(assistant_model=same),
        LOOKUP: method(prompt_lookup_num_tokens=lookup_tokens),
    }


def our_methods(pace: Pace, max_new_tokens: int) -> dict[str, Method]:
    """Return one method per arm that is compared."""
    recorder = RecordingMethods(pace, max_new_tokens=max_new_tokens)
    return {arm: recorder.method(arm) for arm in (NONE, DRAFT_ARM, LOOKUP_ARM, SUFFIX_ARM, AUTO)}


def measure(dtype: str, options: argparse.Namespace) -> list[Timing]:
    """Learn a policy, then time every method on every prompt."""
    collected, timed = demo_prompts(options.collect_per_task, options.per_task)
    with tempfile.TemporaryDirectory() as folder, show_progress() as report:
        prepared = prepare(
            in_folder(load_timed_config(options, dtype, with_answers=True), Path(folder)),
            collected,
            options.max_new_tokens,
            lambda stage, done, total: report(f"{dtype}: {stage}", done, total),
        )
        methods = our_methods(prepared.pace, options.max_new_tokens)
        methods |= transformers_methods(
            prepared.pace, getattr(torch, dtype), options.max_new_tokens
        )
        prompts = encode_prompts(prepared.pace, timed)
        return time_methods(methods, prompts, options.repeats, f"{dtype}: timed runs", report)


def summarise(timings: list[Timing], dtype: str) -> list[dict[str, Any]]:
    """Return a row per method."""
    methods = dict.fromkeys(timing.method for timing in timings)
    return [{"dtype": dtype, "method": name, **speeds(timings, name)} for name in methods]


def compare_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our speeds over their counterparts', per dtype and with each side at its best dtype."""

    def speed(method: str, dtype: str | None) -> float:
        return max(
            r["tokens_per_second"]
            for r in rows
            if r["method"] == method and dtype in (None, r["dtype"])
        )

    result = []
    for dtype in (*dict.fromkeys(r["dtype"] for r in rows), None):
        assisted = max(speed(ASSISTED, dtype), speed(ASSISTED_SAME_K, dtype))
        best = max(speed(GENERATE, dtype), assisted, speed(LOOKUP, dtype))
        result.append(
            {
                "dtype": dtype or "best of each side",
                "none / generate": speed(NONE, dtype) / speed(GENERATE, dtype),
                "draft_model / assistant_model": speed(DRAFT_ARM, dtype) / assisted,
                "prompt_lookup / prompt_lookup": speed(LOOKUP_ARM, dtype) / speed(LOOKUP, dtype),
                "auto / best of transformers": speed(AUTO, dtype) / best,
                "auto / none": speed(AUTO, dtype) / speed(NONE, dtype),
            }
        )
    return result


def markdown(
    rows: list[dict[str, Any]], ratios: list[dict[str, Any]], facts: dict[str, Any]
) -> str:
    """Return the page."""
    lines = page("paceline against transformers", facts, "transformers")
    lines += table(
        rows,
        {
            "dtype": "{dtype}",
            "method": "{method}",
            "tokens/s": "{tokens_per_second:.0f}",
            "over `none`": "{over_none:.2f}",
            **by_task(rows[0], "over_none_by_task"),
            "same text": "{equal_to_none} of {prompts}",
        },
    )
    columns = {key: f"{{{key}:.2f}}x" for key in ratios[0]}
    return "\n".join([*lines, "", *table(ratios, {**columns, "dtype": "{dtype}"})]) + "\n"


def main() -> None:
    """Run the comparison."""
    parser = make_parser(__doc__, per_task=10, max_new_tokens=128)
    parser.add_argument("--collect-per-task", type=int, default=60, help="prompts to learn from")
    parser.add_argument("--repeats", type=int, default=3)
    options = parse(parser)
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        rows += summarise(measure(dtype, options), dtype)
    ratios = compare_pairs(rows)
    facts = describe_run(
        f"Batch 1, greedy, {options.per_task} prompts of each task, at most "
        f"{options.max_new_tokens} new tokens, median of {options.repeats} interleaved runs, "
        "seconds end to end."
    )
    text = markdown(rows, ratios, facts)
    result = {"circumstances": facts, "methods": rows, "ratios": ratios}
    save(options.out, "versus_transformers", text, result)


if __name__ == "__main__":
    main()
