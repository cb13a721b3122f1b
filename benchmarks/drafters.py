"""Every drafter by the clock on the bundled target: four tasks, and Spec-Bench where it is available.

    python benchmarks/drafters.py [--per-task 8] [--spec-bench FILE] [--dtypes bfloat16 float32]

Batch 1, one process, interleaved, seconds end to end. The arms are those of `drafters.yaml` next to this
file. Of Spec-Bench, each first turn is one message; those that do not fit the target's context
together with the answer are counted and left out. The file is looked for in PACELINE_DATA.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from result_pages import by_task, count_drafts, describe_run, page, save, speeds, table
from timed_setup import (
    load_timed_config,
    make_parser,
    messages,
    parse,
    show_progress,
)

from paceline.assembly import Pace, build
from paceline.bench.timed import TimedPrompt, Timing
from paceline.config import Config
from paceline.contracts import NONE, Progress, PromptRecord
from paceline.drafting.trigram.build import build_table
from paceline.drafting.trigram.corpora import TokenSequences
from paceline.experiments.by_clock import RecordingMethods, encode_prompts, time_methods
from paceline.experiments.demo_prompts import demo_prompts
from paceline.experiments.prompt_files import read_spec_bench

SPEC_BENCH = "spec-bench"
ANSWERS_ARM = "answers"


def spec_bench(path: Path, pace: Pace, new_tokens: int, most: int) -> tuple[list[TimedPrompt], str]:
    """Return at most `most` prompts that fit, evenly over the file, and a note on the selection."""
    context = pace.parts.target.context_length
    records = [replace(record, domain=SPEC_BENCH) for record in read_spec_bench(path)]
    fitting = [
        p for p in encode_prompts(pace, records) if len(p.tokens) + new_tokens <= context + 1
    ]
    step = max(1, -(-len(fitting) // most))
    return fitting[::step], (
        f"Spec-Bench: {len(records)} first turns, {len(records) - len(fitting)} left out because "
        f"prompt and {new_tokens} new tokens exceed the context of {context}; of the other "
        f"{len(fitting)} every {step}th, {len(fitting[::step])} in all."
    )


def add_answers_table(
    config: Config, records: Sequence[PromptRecord], new_tokens: int, folder: Path, report: Progress
) -> Config:
    """Return the configuration with a tri-gram table built from the target's answers to `records`."""
    pace = Pace(build(config.model_copy(update={"drafters": {}})))
    requests = [
        pace.request(
            messages(r.prompt),
            id=r.id,
            max_new_tokens=new_tokens,
            drafter=NONE,
            generation_config="none",
        )
        for r in records
    ]
    answers = []
    for completion in pace.stream(requests):
        answers.append(completion.token_ids)
        report("the target's answers", len(answers), len(requests))
    path = folder / "answers.trigrams"
    build_table([TokenSequences("answers", answers)], path, pace.parts.vocabulary.hash())
    arm = config.drafters[ANSWERS_ARM]
    arm = arm.model_copy(update={"settings": {**arm.settings, "table": str(path)}})
    return config.model_copy(update={"drafters": {**config.drafters, ANSWERS_ARM: arm}})


def summarise(
    timings: list[Timing],
    recorder: RecordingMethods,
    prompts: Sequence[TimedPrompt],
    pace: Pace,
    dtype: str,
    temperature: float,
) -> Iterator[dict[str, Any]]:
    """Yield a row per arm: speed, speed-up over `none` by task, tau, texts equal to those of `none`."""
    for arm in pace.drafters:
        rounds, drafted, accepted = count_drafts(recorder.of(arm, prompts))
        yield {
            "dtype": dtype,
            "temperature": temperature,
            "arm": arm,
            "kind": pace.parts.drafters[arm].kind,
            "tau": 1 + accepted / rounds,
            "drafted_a_round": drafted / rounds,
            **speeds(timings, arm),
        }


def markdown(rows: list[dict[str, Any]], notes: Sequence[str], facts: dict[str, Any]) -> str:
    """Return the page."""
    lines = page("Every drafter by the clock", facts)
    lines[2] += " Columns of tasks are speed-ups over `none` on that task."
    lines += [*(f"{note}\n" for note in notes)]
    lines += table(
        rows,
        {
            "dtype": "{dtype}",
            "temperature": "{temperature:g}",
            "arm": "{arm}",
            "kind": "{kind}",
            "tokens/s": "{tokens_per_second:.0f}",
            "over `none`": "{over_none:.2f}",
            **by_task(rows[0], "over_none_by_task"),
            "drafted per round": "{drafted_a_round:.1f}",
            "tau": "{tau:.2f}",
            "same text": "{equal_to_none} of {prompts}",
        },
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time all arms at every dtype and temperature."""
    data = Path(os.environ["PACELINE_DATA"]) if "PACELINE_DATA" in os.environ else None
    own_config = Path(__file__).with_name("drafters.yaml")
    parser = make_parser(__doc__, per_task=8, config=own_config)
    parser.add_argument("--collect-per-task", type=int, default=48, help="answers in the table")
    parser.add_argument("--spec-bench", type=Path, default=data and data / "spec_bench.jsonl")
    parser.add_argument("--most-of-spec-bench", type=int, default=40)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--repeats", type=int, default=1)
    options = parse(parser)
    new_tokens = options.max_new_tokens
    collected, timed = demo_prompts(options.collect_per_task, options.per_task)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder, show_progress() as report:
        for dtype in options.dtypes:
            config = load_timed_config(options, dtype)
            config = add_answers_table(config, collected, new_tokens, Path(folder), report)
            pace = Pace(build(config))
            prompts = encode_prompts(pace, timed)
            if options.spec_bench is not None:
                more, note = spec_bench(
                    options.spec_bench, pace, new_tokens, options.most_of_spec_bench
                )
                prompts += more
                notes = [note]
            for temperature in options.temperatures:
                # with a seed the text is the same for every arm, so that all decode the same
                recorder = RecordingMethods(
                    pace,
                    max_new_tokens=new_tokens,
                    temperature=temperature,
                    seed=7 if temperature else None,
                )
                methods = {arm: recorder.method(arm) for arm in pace.drafters}
                stage = f"{dtype}, temperature {temperature:g}"
                timings = time_methods(methods, prompts, options.repeats, stage, report)
                rows += summarise(timings, recorder, prompts, pace, dtype, temperature)
    facts = describe_run(
        f"Batch 1, {options.per_task} prompts of each task, at most {new_tokens} new "
        f"tokens, median of {options.repeats} interleaved runs, seconds end to end."
    )
    result = {"circumstances": facts, "notes": notes, "arms": rows}
    save(options.out, "drafters", markdown(rows, notes, facts), result)


if __name__ == "__main__":
    main()
