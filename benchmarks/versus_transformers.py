"""paceline against transformers' own generate, on the bundled models, one process, interleaved.

    python benchmarks/versus_transformers.py [--per-task 10] [--repeats 3] [--max-new-tokens 128]

Batch 1, greedy, same weights, same prompts, seconds from prompt tokens to output tokens. Four pairs
at float32 and at bfloat16: `none` against `generate`, `draft_model` against
`generate(assistant_model=...)` with the same drafter (transformers gets the better of its default
and of our draft length), `prompt_lookup` against `prompt_lookup_num_tokens`, `auto` against all.
The policy of `auto` is learned here, on prompts that are not timed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from paceline.assembly import Pace
from paceline.bench.circumstances import circumstances, headline
from paceline.bench.timed import Method, Timing, num_equal_outputs, select, tokens_per_second
from paceline.cli.options import configured
from paceline.cli.progress import progress
from paceline.contracts import join_arm
from paceline.experiments.by_clock import (
    RecordingMethods,
    encode_prompts,
    time_methods,
    without_prefixes,
)
from paceline.experiments.demo_prompts import demo_prompts
from paceline.verbs.pipeline import in_folder, prepare

GENERATE = "transformers generate"
ASSISTED = "transformers assistant_model"
ASSISTED_SAME_K = "transformers assistant_model, our length"
LOOKUP = "transformers prompt_lookup_num_tokens"
DRAFTER, DRAFT_LENGTH = "general", 4
DRAFT_ARM = join_arm(DRAFTER, DRAFT_LENGTH)
LOOKUP_ARM = "lookup"
SUFFIX_ARM = "suffix"  # without a counterpart: often the best single one


def transformers_methods(pace: Pace, dtype: torch.dtype, max_new_tokens: int) -> dict[str, Method]:
    """transformers' counterparts, on instances of their own."""
    config = pace.parts.config

    def load(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    target = load(config.target.model)
    drafter_settings = config.drafters[DRAFTER].settings
    default, same = load(drafter_settings["model"]), load(drafter_settings["model"])
    same.generation_config.num_assistant_tokens = DRAFT_LENGTH
    same.generation_config.num_assistant_tokens_schedule = "constant"
    same.generation_config.assistant_confidence_threshold = 0.0
    lookup_tokens = config.drafters[LOOKUP_ARM].settings["num_draft_tokens"]

    def method(**extra: Any) -> Method:
        def run(tokens: Any) -> list[int]:
            ids = torch.tensor([list(tokens)])
            with torch.inference_mode():
                output = target.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    **extra,
                )
            answer: list[int] = output[0, ids.shape[1] :].tolist()
            return answer

        return run

    return {
        GENERATE: method(),
        ASSISTED: method(assistant_model=default),
        ASSISTED_SAME_K: method(assistant_model=same),
        LOOKUP: method(prompt_lookup_num_tokens=lookup_tokens),
    }


def measure(dtype_name: str, options: argparse.Namespace, console: Console) -> list[Timing]:
    collected, timed = demo_prompts(options.collect_per_task, options.per_task)
    with tempfile.TemporaryDirectory() as folder, progress(console) as report:
        config = configured(options.config, dtype=dtype_name, threads=options.threads)
        prepared = prepare(
            without_prefixes(in_folder(config, Path(folder))),
            collected,
            options.max_new_tokens,
            lambda stage, done, total: report(f"{dtype_name}: {stage}", done, total),
        )
        pace = prepared.pace
        ours = RecordingMethods(pace, max_new_tokens=options.max_new_tokens)
        methods = {
            name: ours.method(name) for name in ("none", DRAFT_ARM, LOOKUP_ARM, SUFFIX_ARM, "auto")
        }
        methods |= transformers_methods(pace, getattr(torch, dtype_name), options.max_new_tokens)
        prompts = encode_prompts(pace, timed)
        stage = f"{dtype_name}: timed runs"
        return time_methods(methods, prompts, options.repeats, stage, report)


def summarise(timings: list[Timing], dtype: str) -> list[dict[str, Any]]:
    """A row for every method: speed, speed-ups over plain decoding, texts equal to plain ones."""
    methods = list(dict.fromkeys(t.method for t in timings))
    domains = list(dict.fromkeys(t.domain for t in timings))
    plain = {d: tokens_per_second(select(timings, "none", d)) for d in (None, *domains)}
    rows = []
    for name in methods:
        own = select(timings, name)
        rows.append(
            {
                "dtype": dtype,
                "method": name,
                "tokens_per_second": tokens_per_second(own),
                "over_none": tokens_per_second(own) / plain[None],
                "over_none_by_task": {
                    d: tokens_per_second(select(own, domain=d)) / plain[d] for d in domains
                },
                "equal_to_none": num_equal_outputs(timings, name, "none"),
                "prompts": len(own),
                "tokens": sum(len(t.output_tokens) for t in own),
            }
        )
    return rows


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of ours over its counterpart, within a dtype and each side at its best dtype."""

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
                "none / generate": speed("none", dtype) / speed(GENERATE, dtype),
                "draft_model / assistant_model": speed(DRAFT_ARM, dtype) / assisted,
                "prompt_lookup / prompt_lookup": speed(LOOKUP_ARM, dtype) / speed(LOOKUP, dtype),
                "auto / best of transformers": speed("auto", dtype) / best,
                "auto / none": speed("auto", dtype) / speed("none", dtype),
            }
        )
    return result


def markdown(
    rows: list[dict[str, Any]], ratios: list[dict[str, Any]], facts: dict[str, Any]
) -> str:
    domains = list(rows[0]["over_none_by_task"])
    lines = [
        "# paceline against transformers",
        "",
        f"{headline(facts, 'transformers')} {facts['setting']}",
        "",
        "| dtype | method | tokens/s | over `none` | " + " | ".join(domains) + " | same text |",
        "|---|---|---|---|" + "---|" * (len(domains) + 1),
    ]
    for r in rows:
        by_task = " | ".join(f"{r['over_none_by_task'][d]:.2f}" for d in domains)
        lines.append(
            f"| {r['dtype']} | {r['method']} | {r['tokens_per_second']:.0f} | "
            f"{r['over_none']:.2f} | {by_task} | {r['equal_to_none']} of {r['prompts']} |"
        )
    names = list(ratios[0])
    lines += ["", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for ratio in ratios:
        cells = [v if isinstance(v, str) else f"{v:.2f}x" for v in ratio.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=Path("paceline.yaml"))
    parser.add_argument("--per-task", type=int, default=10, help="timed prompts of each task")
    parser.add_argument("--collect-per-task", type=int, default=60, help="prompts to learn from")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        rows += summarise(measure(dtype, options, console), dtype)
    ratios = pairs(rows)
    facts: dict[str, Any] = circumstances()
    facts["setting"] = (
        f"Batch 1, greedy, {options.per_task} prompts of each task, at most "
        f"{options.max_new_tokens} new tokens, median of {options.repeats} interleaved runs, "
        "seconds end to end."
    )
    text = markdown(rows, ratios, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "versus_transformers.md").write_text(text)
    result = {"circumstances": facts, "methods": rows, "ratios": ratios}
    (options.out / "versus_transformers.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
