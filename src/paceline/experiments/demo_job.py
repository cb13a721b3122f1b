"""The demo: the whole main job on the bundled models, in a few minutes on two cores.

Collects, prices and learns on some prompts; then decodes others by the clock with every arm, with a
random one and with the policy's choice. Every figure is measured here and now. The per-request
oracle's arm is picked by replay, and its clocked time is that of the arm's own timed run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.bench.circumstances import circumstances
from paceline.bench.timed import (
    TimedPrompt,
    Timing,
    num_equal_outputs,
    select,
    time_interleaved,
    tokens_per_second,
)
from paceline.config import PathsSection
from paceline.contracts import AUTO, NONE, split_arm
from paceline.errors import DecodingError
from paceline.experiments.demo_prompts import demo_prompts
from paceline.replay.rounds import max_output, replay, walk
from paceline.rewards import request_seconds
from paceline.verbs.pipeline import Prepared, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from paceline.assembly import Pace
    from paceline.config import Config
    from paceline.contracts import Completion
    from paceline.costs.table import CostTable

    OnProgress = Callable[[str, int, int], None]

RANDOM = "random"
ORACLE = "oracle"
ALL_TASKS = "all"


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm on one task."""

    tokens_per_second: float
    speedup: float  # over none, total seconds a token
    block_efficiency: float
    equal_texts: int
    prompts: int


@dataclass(slots=True)
class DemoResult:
    """The table of the demo and everything said beside it."""

    circumstances: dict[str, str | int]
    settings: dict[str, str | int]
    cells: dict[str, dict[str, Cell]]  # task -> method -> cell
    chosen: dict[str, dict[str, int]]  # task -> arm -> requests that auto gave it
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
    on_progress: OnProgress = lambda stage, done, total: None,
) -> DemoResult:
    """Run the main job end to end; artefacts go into `folder`."""
    collected, timed = demo_prompts(collect_per_task, timed_per_task)
    config = in_folder(config, folder)
    # every method decodes the same prompts, and each must pay for its own prefill
    engine = config.engine.model_copy(update={"prefix_positions": 0})
    config = config.model_copy(update={"engine": engine})
    prepared = prepare(config, collected, max_new_tokens, on_progress)
    pace = prepared.pace
    prompts = [
        TimedPrompt(p.id, p.domain, tuple(pace.encode([{"role": "user", "content": p.prompt}])))
        for p in timed
    ]
    # every drafter at the length that was best for it on the collected prompts
    arms = list(prepared.learned.report.overall.arms)
    recorder = _Recorder(pace, arms, max_new_tokens)
    methods = {name: recorder.method(name) for name in (*arms, RANDOM, AUTO)}
    total, done = len(prompts) * len(methods), 0

    def on_run() -> None:
        nonlocal done
        done += 1
        on_progress("decode by the clock", done, total)

    timings = time_interleaved(methods, prompts, on_run=on_run)
    timings += _oracle(pace, arms, prepared.costs, prompts, timings, max_new_tokens)
    if pace.parts.target.dtype == torch.float32 or pace.parts.target.exact:
        _check_texts(timings, list(methods))
    return _result(prepared, recorder, timings, prompts, max_new_tokens, len(collected))


def in_folder(config: Config, folder: Path) -> Config:
    """Return the configuration with the paths of the demo's files in a folder."""
    folder = folder.resolve()
    paths = PathsSection(
        store=folder / "collection", costs=folder / "costs.json", policy=folder / "policy"
    )
    return config.model_copy(update={"paths": paths})


def _check_texts(timings: list[Timing], methods: Sequence[str]) -> None:
    """In float32 and in exact mode every method must have written what `none` wrote."""
    for method in methods:
        written = select(timings, method)
        differing = len(written) - num_equal_outputs(timings, method, NONE)
        if differing:
            raise DecodingError(
                f"{differing} of {len(written)} texts of {method} differ from plain decoding's, "
                "where they must not: please report this with the machine and the versions"
            )


class _Recorder:
    """Runs a method and keeps its completions."""

    def __init__(self, pace: Pace, arms: Sequence[str], max_new_tokens: int) -> None:
        self.pace = pace
        self.drafting = [arm for arm in arms if arm != NONE]
        self.max_new_tokens = max_new_tokens
        self.completions: dict[tuple[str, tuple[int, ...]], Completion] = {}

    def method(self, name: str) -> Callable[[Sequence[int]], Sequence[int]]:
        def run(tokens: Sequence[int]) -> Sequence[int]:
            drafter = self._random_arm(tokens) if name == RANDOM else name
            request = self.pace.request(
                list(tokens),
                drafter=drafter,
                max_new_tokens=self.max_new_tokens,
                generation_config="none",
            )
            completion = next(iter(self.pace.stream([request])))
            self.completions[name, tuple(tokens)] = completion
            return completion.token_ids

        return run

    def _random_arm(self, tokens: Sequence[int]) -> str:
        """Any arm but none, drawn anew for each prompt, the same in every run."""
        digest = hashlib.sha256(repr(list(tokens)).encode()).digest()
        return self.drafting[digest[0] % len(self.drafting)]


def _oracle(
    pace: Pace,
    arms: Sequence[str],
    costs: CostTable,
    prompts: Sequence[TimedPrompt],
    timings: Sequence[Timing],
    max_new_tokens: int,
) -> list[Timing]:
    """For each prompt the timed run of the arm that replay predicts to be fastest."""
    by_key = {(t.method, t.prompt): t for t in timings}
    context = pace.parts.target.context_length
    oracle = []
    for prompt in prompts:
        trajectory = by_key[NONE, prompt.id].output_tokens
        limit = max_output(max_new_tokens, len(prompt.tokens), context)
        seconds = {
            arm: request_seconds(
                costs.seconds,
                arm,
                len(prompt.tokens),
                _rounds(pace, arm, prompt.tokens, trajectory, limit),
            )
            for arm in arms
        }
        chosen = by_key[min(seconds, key=seconds.__getitem__), prompt.id]
        oracle.append(
            Timing(ORACLE, prompt.id, prompt.domain, chosen.seconds, chosen.output_tokens)
        )
    return oracle


def _rounds(
    pace: Pace, arm: str, tokens: Sequence[int], trajectory: Sequence[int], limit: int
) -> np.ndarray:
    name, length = split_arm(arm)
    replayed = replay(pace.parts.drafters[name], tokens, trajectory, limit)
    return replayed.rounds if replayed.ahead is None else walk(replayed.ahead, length)


def _result(
    prepared: Prepared,
    recorder: _Recorder,
    timings: list[Timing],
    prompts: Sequence[TimedPrompt],
    max_new_tokens: int,
    num_collected: int,
) -> DemoResult:
    pace = prepared.pace
    domains = list(dict.fromkeys(p.domain for p in prompts))
    methods = list(dict.fromkeys(t.method for t in timings))
    cells: dict[str, dict[str, Cell]] = {}
    chosen: dict[str, dict[str, int]] = {}
    for task in (*domains, ALL_TASKS):
        part = [p for p in prompts if task in (p.domain, ALL_TASKS)]
        ids = {p.id for p in part}
        own = [t for t in timings if t.prompt in ids]
        completions = {
            m: [recorder.completions[m, p.tokens] for p in part] for m in methods if m != ORACLE
        }
        cells[task] = {m: _cell(own, m, completions.get(m, [])) for m in methods}
        chosen[task] = dict(Counter(c.decision.arm for c in completions[AUTO]).most_common())
    overall = cells[ALL_TASKS]
    best = max(recorder.drafting, key=lambda name: overall[name].tokens_per_second)
    target = pace.parts.target
    return DemoResult(
        circumstances=circumstances(),
        settings={
            "dtype": str(target.dtype).removeprefix("torch."),
            "exact": target.exact,
            "max_new_tokens": max_new_tokens,
            "collected_prompts": num_collected,
            "timed_prompts": len(prompts),
        },
        cells=cells,
        chosen=chosen,
        best_single=best,
        auto_over_best_single=overall[AUTO].tokens_per_second / overall[best].tokens_per_second,
        auto_over_oracle=overall[AUTO].tokens_per_second / overall[ORACLE].tokens_per_second,
        predicted=prepared.learned.report.headline(),
        stage_seconds=prepared.seconds,
    )


def _cell(timings: list[Timing], method: str, completions: Sequence[Completion]) -> Cell:
    own = select(timings, method)
    speed = tokens_per_second(own)
    rounds = sum(len(c.rounds) for c in completions)
    emitted = sum(len(c.token_ids) - 1 for c in completions)
    return Cell(
        tokens_per_second=speed,
        speedup=speed / tokens_per_second(select(timings, NONE)),
        block_efficiency=emitted / rounds if rounds else 1.0,
        equal_texts=num_equal_outputs(timings, method, NONE),
        prompts=len(own),
    )
