"""Interleaved timing of methods in one process, so that drift of the machine affects all alike.

A method is a function from prompt tokens to output tokens. Every prompt runs through every method
before the next prompt, in an order that changes from prompt to prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

Method = Callable[[Sequence[int]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Timing:
    """One method on one prompt: the median of the repeats' seconds, and the output."""

    method: str
    prompt: str
    domain: str
    seconds: float
    output_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TimedPrompt:
    """A prompt with its tokens, the same for every method."""

    id: str
    domain: str
    tokens: tuple[int, ...]


def time_interleaved(
    methods: Mapping[str, Method],
    prompts: Sequence[TimedPrompt],
    repeats: int = 1,
    seed: int = 0,
    on_run: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time every method on every prompt, after one untimed run of each method."""
    for run in methods.values():
        run(prompts[0].tokens)
    order = random.Random(seed)
    timings = []
    for prompt in prompts:
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        outputs: dict[str, tuple[int, ...]] = {}
        for _ in range(repeats):
            names = list(methods)
            order.shuffle(names)
            for name in names:
                began = perf_counter()
                output = methods[name](prompt.tokens)
                seconds[name].append(perf_counter() - began)
                outputs[name] = tuple(output)
                on_run()
        timings += [
            Timing(name, prompt.id, prompt.domain, median(seconds[name]), outputs[name])
            for name in methods
        ]
    return timings


def tokens_per_second(timings: Sequence[Timing]) -> float:
    """Return all emitted tokens over all seconds; 0 without any time."""
    total = sum(t.seconds for t in timings)
    return sum(len(t.output_tokens) for t in timings) / total if total > 0 else 0.0


def select(
    timings: Sequence[Timing], method: str | None = None, domain: str | None = None
) -> list[Timing]:
    """Return the timings of one method, one domain, or both."""
    return [
        t
        for t in timings
        if (method is None or t.method == method) and (domain is None or t.domain == domain)
    ]


def num_equal_outputs(timings: Sequence[Timing], method: str, reference: str) -> int:
    """Return the number of prompts on which a method's tokens equal the reference's."""
    truth = {t.prompt: t.output_tokens for t in timings if t.method == reference}
    return sum(t.output_tokens == truth[t.prompt] for t in timings if t.method == method)
