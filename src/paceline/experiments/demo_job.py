"""The demo: the whole main job on the bundled models, in a few minutes on two cores.

It collects, profiles and learns on some prompts, and decodes others by the clock: with every arm, with
a random one and with the policy's choice. Every figure is measured in this run. Replay picks the arm
of the per-request oracle; its time is that of the arm's own timed run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from paceline.bench.circumstances import circumstances
from paceline.bench.timed import Timing, num_equal_outputs, select, tokens_per_second
from paceline.contracts import AUTO, NONE, no_progress
from paceline.errors import DecodingError
from paceline.experiments.by_clock import (
    RecordingMethods,
    encode_prompts,
    replay_arm,
    time_methods,
    without_prefixes,
)
from paceline.experiments.demo_prompts import demo_prompts
from paceline.rewards import request_seconds
from paceline.verbs.pipeline import in_folder, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.bench.timed import TimedPrompt
    from paceline.config import Config
    from paceline.contracts import Completion, Progress
    from paceline.verbs.pipeline import Prepared

RANDOM = "random"
ORACLE = "oracle"
ALL_TASKS = "all"


@dataclass(frozen=True, slots=True)
class MethodFigures:
    """The figures of one method (an arm, random, auto or the oracle) on one task."""

    tokens_per_second: float
    speedup: float  # over none, in total seconds per token
    block_efficiency: float
    equal_texts: int
    prompts: int


@dataclass(slots=True)
class DemoResult:
    """The figures of the demo, and the circumstances in which they were measured."""

    circumstances: dict[str, str | int]
    settings: dict[str, str | int]
    cells: dict[str, dict[str, MethodFigures]]  # task -> method -> figures
    chosen: dict[str, dict[str, int]]  # task -> arm -> number of requests for which auto chose it
    best_single: str
    auto_over_best_single: float
    auto_over_oracle: float
    predicted: dict[str, float]  # policy, best single, oracle on held-out prompts, by replay
    stage_seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)


def demo(
    config: Config,
    folder: Path,
    collect_per_task: int = 48,
    timed_per_task: int = 8,
    max_new_tokens: int = 96,
    on_progress: Progress = no_progress,
) -> DemoResult:
    """Run the main job end to end; artefacts go into `folder`.

    Raises DecodingError if a text differs from that of `none` in float32 or on an exact target.
    """
    collected, timed = demo_prompts(collect_per_task, timed_per_task)
    config = without_prefixes(in_folder(config, folder.resolve()))
    prepared = prepare(config, collected, max_new_tokens, on_progress)
    pace = prepared.pace
    prompts = encode_prompts(pace, timed)
    # each drafter at the length that was best on the collected prompts
    arms = list(prepared.learned.report.overall.arms)
    recorder = RecordingMethods(pace, max_new_tokens=max_new_tokens)
    methods = {name: recorder.method(name) for name in arms}
    drafting = [arm for arm in arms if arm != NONE]
    methods[RANDOM] = recorder.method(RANDOM, lambda tokens: _random_arm(tokens, drafting))
    methods[AUTO] = recorder.method(AUTO)
    timings = time_methods(methods, prompts, on_progress=on_progress)
    timings += _oracle(prepared, arms, prompts, timings, max_new_tokens)
    if pace.parts.target.dtype == torch.float32 or pace.parts.target.exact:
        _check_texts(timings, list(methods))
    result = _result(prepared, recorder, timings, prompts, drafting)
    result.settings |= {
        "max_new_tokens": max_new_tokens,
        "collected_prompts": len(collected),
        "timed_prompts": len(prompts),
    }
    return result


def _random_arm(tokens: Sequence[int], drafting: Sequence[str]) -> str:
    """Return a drafting arm that depends on the prompt alone, so that it is the same in every run."""
    digest = hashlib.sha256(repr(list(tokens)).encode()).digest()
    return drafting[digest[0] % len(drafting)]


def _check_texts(timings: list[Timing], methods: Sequence[str]) -> None:
    """Raise DecodingError unless every method wrote the texts of `none`."""
    for method in methods:
        written = select(timings, method)
        differing = len(written) - num_equal_outputs(timings, method, NONE)
        if differing:
            raise DecodingError(
                f"{differing} of {len(written)} texts of {method} differ from plain decoding's, "
                "where they must not: please report this with the machine and the versions"
            )


def _oracle(
    prepared: Prepared,
    arms: Sequence[str],
    prompts: Sequence[TimedPrompt],
    timings: Sequence[Timing],
    max_new_tokens: int,
) -> list[Timing]:
    """Return, for each prompt, the timed run of the arm that replay predicts to be fastest."""
    by_key = {(t.method, t.prompt): t for t in timings}
    pace, price = prepared.pace, prepared.costs.seconds
    oracle = []
    for prompt in prompts:
        output = by_key[NONE, prompt.id].output_tokens
        seconds = {}
        for arm in arms:
            replayed = replay_arm(pace, arm, prompt.tokens, output, max_new_tokens)
            seconds[arm] = request_seconds(
                price, arm, len(prompt.tokens), replayed.table, proposed=replayed.proposed
            )
        chosen = by_key[min(seconds, key=seconds.__getitem__), prompt.id]
        oracle.append(
            Timing(ORACLE, prompt.id, prompt.domain, chosen.seconds, chosen.output_tokens)
        )
    return oracle


def _result(
    prepared: Prepared,
    recorder: RecordingMethods,
    timings: list[Timing],
    prompts: Sequence[TimedPrompt],
    drafting: Sequence[str],
) -> DemoResult:
    methods = list(dict.fromkeys(t.method for t in timings))
    cells: dict[str, dict[str, MethodFigures]] = {}
    chosen: dict[str, dict[str, int]] = {}
    for task in (*dict.fromkeys(p.domain for p in prompts), ALL_TASKS):
        part = [p for p in prompts if task in (p.domain, ALL_TASKS)]
        ids = {p.id for p in part}
        own = [t for t in timings if t.prompt in ids]
        completions = {m: recorder.of(m, part) for m in methods if m != ORACLE}
        cells[task] = {m: _figures(own, m, completions.get(m, [])) for m in methods}
        chosen[task] = dict(Counter(c.decision.arm for c in completions[AUTO]).most_common())
    overall = cells[ALL_TASKS]
    best = max(drafting, key=lambda name: overall[name].tokens_per_second)
    target = prepared.pace.parts.target
    return DemoResult(
        circumstances=circumstances(),
        settings={"dtype": str(target.dtype).removeprefix("torch."), "exact": target.exact},
        cells=cells,
        chosen=chosen,
        best_single=best,
        auto_over_best_single=overall[AUTO].tokens_per_second / overall[best].tokens_per_second,
        auto_over_oracle=overall[AUTO].tokens_per_second / overall[ORACLE].tokens_per_second,
        predicted=prepared.learned.report.headline(),
        stage_seconds=prepared.seconds,
    )


def _figures(
    timings: list[Timing], method: str, completions: Sequence[Completion]
) -> MethodFigures:
    own = select(timings, method)
    speed = tokens_per_second(own)
    rounds = sum(len(c.rounds) for c in completions)
    emitted = sum(len(c.token_ids) - 1 for c in completions)
    return MethodFigures(
        tokens_per_second=speed,
        speedup=speed / tokens_per_second(select(timings, NONE)),
        block_efficiency=emitted / rounds if rounds else 1.0,
        equal_texts=num_equal_outputs(timings, method, NONE),
        prompts=len(own),
    )
