"""Trained students by the clock: whole requests of judging prompts, interleaved with plain decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.assembly import Pace, build
from paceline.bench.timed import TimedPrompt, num_equal_outputs, select
from paceline.config import DrafterSection
from paceline.contracts import NONE
from paceline.experiments.by_clock import RecordingMethods, time_methods
from paceline.learning.evaluation.bootstrap import interval, resample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.bench.timed import Timing
    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.distillation.batches import Example

_REPEATS: Final = 3


def time_students(
    config: Config,
    students: Mapping[str, tuple[Path, int]],
    judging: Sequence[Example],
    max_new_tokens: int,
    report: Progress,
) -> dict[str, Any]:
    """Return each student's speed over plain decoding, greedy, with a 95% interval over prompts.

    students: folder and draft length by name. judging: the texts whose prompts are decoded.
    """
    drafters = {
        name: DrafterSection(
            kind="draft_model",
            settings={"model": str(folder), "dtype": "bfloat16", "num_draft_tokens": length},
        )
        for name, (folder, length) in students.items()
    }
    pace = Pace(build(config.model_copy(update={"drafters": drafters})))
    recording = RecordingMethods(pace, max_new_tokens=max_new_tokens, temperature=0.0)
    methods = {name: recording.method(name) for name in (NONE, *students)}
    prompts = [
        TimedPrompt(e.id, e.domain, tuple(map(int, e.tokens[: e.num_prompt]))) for e in judging
    ]
    timings = time_methods(methods, prompts, _REPEATS, "decode by the clock", report)
    plain = select(timings, NONE)
    rows = {}
    for name, (_, length) in students.items():
        own = select(timings, name)
        rows[name] = {
            "num_draft_tokens": length,
            "speedup": _speedup(plain, own),
            "tasks": {
                task: _speedup(select(timings, NONE, task), select(timings, name, task))[0]
                for task in dict.fromkeys(p.domain for p in prompts)
            },
            "equal_texts": num_equal_outputs(timings, name, NONE),
        }
    return {"prompts": len(prompts), "max_new_tokens": max_new_tokens, "students": rows}


def _speedup(plain: Sequence[Timing], own: Sequence[Timing]) -> list[float]:
    """Return the ratio of tokens per second and its interval's ends."""
    columns = np.array(
        [
            (a.seconds, len(a.output_tokens), b.seconds, len(b.output_tokens))
            for a, b in zip(plain, own, strict=True)
        ]
    )
    found = resample(columns, [a.domain for a in plain], seed=0)
    value, draws = _ratio(found.sums.sum(axis=0)), _ratio(found.drawn.sum(axis=1))
    own_interval = interval(float(value), draws)
    return [round(x, 3) for x in (own_interval.value, own_interval.low, own_interval.high)]


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Return speed-ups [...] of sums [..., 4]."""
    plain_seconds, plain_tokens, seconds, tokens = np.moveaxis(sums, -1, 0)
    return np.asarray(tokens / seconds * plain_seconds / plain_tokens)
