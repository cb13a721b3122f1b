"""Logged requests in memory: prompts of random words, and answers that follow a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paceline.contracts import GREEDY, Seconds
from paceline.store import LoggedDecision, LogHeader
from support.distillation import VOCAB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Pace

FIRST_WORD = 3  # after the special tokens


def header_of(pace: Pace) -> LogHeader:
    return LogHeader(
        pace.parts.target.fingerprint(), pace.parts.vocabulary.hash(), {"none": "none"}, {}, "ids"
    )


def logged(header: LogHeader, prompt: Sequence[int], output: Sequence[int]) -> LoggedDecision:
    return LoggedDecision(
        header=header,
        time=0.0,
        request_id="0",
        policy="named",
        arm="none",
        propensity=1.0,
        scores={},
        features=None,
        rows_in_flight=None,
        sampling=GREEDY,
        has_rules=False,
        max_new_tokens=len(output),
        num_prompt=len(prompt),
        num_output=len(output),
        rounds=np.zeros((0, 2), dtype=np.int64),
        switches=(),
        seconds=Seconds(),
        seconds_total=0.0,
        finish_reason="length",
        prompt_tokens=tuple(map(int, prompt)),
        output_tokens=tuple(map(int, output)),
    )


def random_prompts(count: int, seed: int = 0, length: int = 6) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[int(t) for t in random.integers(FIRST_WORD, VOCAB, length)] for _ in range(count)]


def answer(prompt: Sequence[int], step: int = 7, length: int = 10) -> list[int]:
    """Return words that each follow from the word before."""
    first = prompt[-1] - FIRST_WORD
    words = (first + step * np.arange(1, length + 1)) % (VOCAB - FIRST_WORD)
    return [int(word) + FIRST_WORD for word in words]
