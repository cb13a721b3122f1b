"""Methods timed against each other in one process, interleaved, so that drift hits all alike.

A method turns prompt tokens into output tokens; what it is made of is not known here. Every prompt
runs through every method before the next prompt, in an order that changes from prompt to prompt.
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
    """One method on one prompt: seconds by the clock, median of the repeats, and what came out."""

    method: str
    prompt: str
    domain: str
    seconds: float
    output_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TimedPrompt:
    """A prompt as every method receives it."""

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
    """Time every method on every prompt; one untimed run of each method comes first."""
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
    """All emitted tokens over all seconds."""
    total = sum(t.seconds for t in timings)
    return sum(len(t.output_tokens) for t in timings) / total if total > 0 else 0.0


def select(
    timings: Sequence[Timing], method: str | None = None, domain: str | None = None
) -> list[Timing]:
    """The timings of one method, one domain, or both."""
    return [
        t
        for t in timings
        if (method is None or t.method == method) and (domain is None or t.domain == domain)
    ]


def num_equal_outputs(timings: Sequence[Timing], method: str, reference: str) -> int:
    """On how many prompts a method's tokens equal the reference's."""
    truth = {t.prompt: t.output_tokens for t in timings if t.method == reference}
    return sum(t.output_tokens == truth[t.prompt] for t in timings if t.method == method)
