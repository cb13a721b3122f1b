"""Every drafter by the clock on the bundled target: four tasks, and Spec-Bench where it is at hand.

    python benchmarks/drafters.py [--per-task 8] [--spec-bench FILE] [--dtypes bfloat16 float32]

Batch 1, one process, interleaved, seconds end to end. The arms are those of `drafters.yaml` beside this
file. Of Spec-Bench, first turns are used, each as one message; those that do not fit the target's
context together with the answer are counted and left out. The file is looked for in PACELINE_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from paceline.assembly import Pace, build
from paceline.bench.circumstances import circumstances, headline
from paceline.bench.timed import (
    TimedPrompt,
    Timing,
    num_equal_outputs,
    select,
    tokens_per_second,
)
from paceline.cli.options import configured
from paceline.cli.progress import progress
from paceline.config import Config
from paceline.contracts import NONE, Progress, PromptRecord
from paceline.experiments.by_clock import (
    RecordingMethods,
    encode_prompts,
    time_methods,
    without_prefixes,
)
from paceline.experiments.demo_prompts import demo_prompts
from paceline.verbs.pipeline import collect, in_folder
from paceline.verbs.trigrams import build_trigrams

SPEC_BENCH = "spec-bench"
ANSWERS_ARM = "answers"


def spec_bench(path: Path, pace: Pace, new_tokens: int, most: int) -> tuple[list[TimedPrompt], str]:
    """At most `most` prompts that fit, evenly over the file; and a line on how they were chosen."""
    with path.open(encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    context = pace.parts.target.context_length
    fitting = []
    for question in questions:
        tokens = tuple(pace.encode([{"role": "user", "content": question["turns"][0]}]))
        if len(tokens) + new_tokens <= context + 1:
            fitting.append(
                TimedPrompt(f"{SPEC_BENCH}/{question['question_id']}", SPEC_BENCH, tokens)
            )
    step = max(1, -(-len(fitting) // most))
    return fitting[::step], (
        f"Spec-Bench: {len(questions)} first turns, {len(questions) - len(fitting)} left out because "
        f"prompt and {new_tokens} new tokens exceed the context of {context}; of the other "
        f"{len(fitting)} every {step}th, {len(fitting[::step])} in all."
    )


def with_answers(
    config: Config, records: Sequence[PromptRecord], new_tokens: int, folder: Path, report: Progress
) -> Config:
    """The configuration with its tri-gram table built from the target's answers to `records`."""
    alone = in_folder(config.model_copy(update={"drafters": {}}), folder)
    collect(alone, records, new_tokens, on_progress=report)
    table = folder / "answers.trigrams"
    build_trigrams(alone, table, from_collection=True)
    drafters = dict(config.drafters)
    arm = drafters[ANSWERS_ARM]
    settings = {**arm.settings, "table": str(table)}
    drafters[ANSWERS_ARM] = arm.model_copy(update={"settings": settings})
    return config.model_copy(update={"drafters": drafters})


def summarise(
    timings: list[Timing],
    prompts: Sequence[TimedPrompt],
    pace: Pace,
    recorder: RecordingMethods,
    dtype: str,
    heat: float,
) -> Iterator[dict[str, Any]]:
    """A row for every arm: speed, speed-up over `none` by task, tau, texts equal to those of `none`."""
    domains = list(dict.fromkeys(t.domain for t in timings))
    plain = {d: tokens_per_second(select(timings, NONE, d)) for d in (None, *domains)}
    for arm in pace.drafters:
        own = select(timings, arm)
        done = recorder.of(arm, prompts)
        drafted = sum(r.drafted for c in done for r in c.rounds)
        accepted = sum(r.accepted for c in done for r in c.rounds)
        rounds = sum(len(c.rounds) for c in done)
        yield {
            "dtype": dtype,
            "temperature": heat,
            "arm": arm,
            "kind": pace.parts.drafters[arm].kind,
            "tokens_per_second": tokens_per_second(own),
            "over_none": tokens_per_second(own) / plain[None],
            "over_none_by_task": {
                d: tokens_per_second(select(own, domain=d)) / plain[d] for d in domains
            },
            "tau": 1 + accepted / rounds,
            "drafted_a_round": drafted / rounds,
            "equal_to_none": num_equal_outputs(timings, arm, NONE),
            "prompts": len(own),
            "tokens": sum(len(t.output_tokens) for t in own),
        }


def markdown(rows: list[dict[str, Any]], notes: Sequence[str], facts: dict[str, Any]) -> str:
    domains = list(rows[0]["over_none_by_task"])
    lines = [
        "# Every drafter by the clock",
        "",
        f"{headline(facts)} {facts['setting']} Columns of "
        "tasks are speed-ups over `none` on that task.",
        "",
        *(f"{note}\n" for note in notes),
        "| dtype | temperature | arm | kind | tokens/s | over `none` | "
        + " | ".join(domains)
        + " | drafted a round | tau | same text |",
        "|" + "---|" * (9 + len(domains)),
    ]
    for r in rows:
        by_task = " | ".join(f"{r['over_none_by_task'][d]:.2f}" for d in domains)
        lines.append(
            f"| {r['dtype']} | {r['temperature']:g} | {r['arm']} | {r['kind']} | "
            f"{r['tokens_per_second']:.0f} | {r['over_none']:.2f} | {by_task} | "
            f"{r['drafted_a_round']:.1f} | {r['tau']:.2f} | {r['equal_to_none']} of {r['prompts']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    data = Path(os.environ["PACELINE_DATA"]) if "PACELINE_DATA" in os.environ else None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("drafters.yaml"))
    parser.add_argument("--per-task", type=int, default=8, help="timed prompts of each task")
    parser.add_argument("--collect-per-task", type=int, default=48, help="answers in the table")
    parser.add_argument("--spec-bench", type=Path, default=data and data / "spec_bench.jsonl")
    parser.add_argument("--most-of-spec-bench", type=int, default=40)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()  # prompts that do not fit are counted here
    console = Console()
    collected, timed = demo_prompts(options.collect_per_task, options.per_task)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder, progress(console) as report:
        for dtype in options.dtypes:
            config = configured(options.config, dtype=dtype, threads=options.threads)
            config = without_prefixes(config)
            work = Path(folder, dtype)
            config = with_answers(config, collected, options.max_new_tokens, work, report)
            pace = Pace(build(config))
            prompts = encode_prompts(pace, timed)
            if options.spec_bench is not None:
                more, note = spec_bench(
                    options.spec_bench, pace, options.max_new_tokens, options.most_of_spec_bench
                )
                prompts += more
                notes = [note]
            for heat in options.temperatures:
                # with a seed the text is the same for every arm, so that all decode the same
                recorder = RecordingMethods(
                    pace,
                    max_new_tokens=options.max_new_tokens,
                    temperature=heat,
                    seed=7 if heat else None,
                )
                methods = {arm: recorder.method(arm) for arm in pace.drafters}
                label = f"{dtype}, temperature {heat:g}"
                timings = time_methods(methods, prompts, options.repeats, label, report)
                rows += summarise(timings, prompts, pace, recorder, dtype, heat)
    facts: dict[str, Any] = circumstances()
    facts["setting"] = (
        f"Batch 1, {options.per_task} prompts of each task, at most {options.max_new_tokens} new "
        f"tokens, median of {options.repeats} interleaved runs, seconds end to end."
    )
    text = markdown(rows, notes, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "drafters.md").write_text(text)
    result = {"circumstances": facts, "notes": notes, "arms": rows}
    (options.out / "drafters.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
