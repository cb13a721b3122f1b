"""Arms that are decoded by the clock, and replayed on the texts that the target wrote there.

The demo, the experiments and the benchmarks share this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.bench.timed import TimedPrompt, time_interleaved
from paceline.contracts import no_progress, split_arm
from paceline.replay.rounds import max_output, replay, walk
from paceline.store.records import ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.assembly import Pace
    from paceline.bench.timed import Method, Timing
    from paceline.config import Config
    from paceline.contracts import Completion, Progress, PromptRecord


def without_prefixes(config: Config) -> Config:
    """Return the configuration without shared prompt beginnings, so that each run pays its prefill."""
    engine = config.engine.model_copy(update={"prefix_positions": 0})
    return config.model_copy(update={"engine": engine})


def encode_prompts(pace: Pace, records: Sequence[PromptRecord]) -> list[TimedPrompt]:
    """Return each prompt as the tokens of one message."""
    return [
        TimedPrompt(r.id, r.domain, tuple(pace.encode([{"role": "user", "content": r.prompt}])))
        for r in records
    ]


class RecordingMethods:
    """Methods for `time_interleaved` that decode with an arm; they record each prompt's last run."""

    def __init__(self, pace: Pace, **settings: Any) -> None:
        """settings: those of `Pace.request` for every run. The model's own are not read."""
        self._pace = pace
        self._settings = {**settings, "generation_config": "none"}
        self.completions: dict[tuple[str, tuple[int, ...]], Completion] = {}
        """By method and prompt tokens."""

    def method(self, name: str, choose: Callable[[Sequence[int]], str] | None = None) -> Method:
        """Return the method of an arm. choose: picks another arm for each prompt's tokens."""

        def decode(tokens: Sequence[int]) -> Sequence[int]:
            arm = name if choose is None else choose(tokens)
            completion = self._pace.complete(list(tokens), drafter=arm, **self._settings)
            self.completions[name, tuple(tokens)] = completion
            return completion.token_ids

        return decode

    def of(self, name: str, prompts: Sequence[TimedPrompt]) -> list[Completion]:
        """Return a method's last completion of each prompt."""
        return [self.completions[name, prompt.tokens] for prompt in prompts]


def time_methods(
    methods: Mapping[str, Method],
    prompts: Sequence[TimedPrompt],
    repeats: int = 1,
    stage: str = "decode by the clock",
    on_progress: Progress = no_progress,
) -> list[Timing]:
    """Time every method on every prompt, interleaved, and count the runs as one stage."""
    done, total = 0, len(methods) * len(prompts) * repeats

    def on_run() -> None:
        nonlocal done
        done += 1
        on_progress(stage, done, total)

    return time_interleaved(methods, prompts, repeats, on_run=on_run)


def replay_arm(
    pace: Pace, arm: str, tokens: Sequence[int], output: Sequence[int], max_new_tokens: int
) -> ReplayedDrafter:
    """Return the consecutive rounds of an arm along an output of the target."""
    name, length = split_arm(arm)
    target = pace.parts.target
    before = target.num_before_output(len(tokens))
    limit = max_output(max_new_tokens, before, target.context_length)
    replayed = replay(pace.parts.drafters[name], tokens, output, limit)
    if replayed.ahead is None:
        return replayed.record
    return ReplayedDrafter(walk(replayed.ahead, length), everywhere=False)
