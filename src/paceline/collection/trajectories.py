"""Decode prompts with the target alone, and note what a policy would have seen of each.

What the prefill leaves comes with the decoding: the engine asks for a choice after it, and the answer
here is always `none`. Other encoders read the prompt alone and are run over what is stored. A part of
the prompts is stored whole, in the prompts' order, so that the shards do not depend on which request
ended first. Knows no drafters and no costs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.contracts import NONE, Context, Decision, Request, sampling_label
from paceline.drafting.none import NoneDrafter
from paceline.engine import Driver, Engine
from paceline.errors import DecodingError, StoreError
from paceline.selection.encoders import TargetHidden
from paceline.store.layout import Trajectory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from paceline.assembly import Pace, Parts
    from paceline.collection.workers import Tick
    from paceline.contracts import Completion, SamplingParams
    from paceline.engine.loop import Choose
    from paceline.models.language_model import LanguageModel
    from paceline.selection.encoders import Encoder


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the target reads it, under one sampling; `id` is the row's."""

    id: str
    domain: str
    tokens: tuple[int, ...]
    sampling: SamplingParams


def under(prompt_id: str, sampling: SamplingParams) -> tuple[str, SamplingParams]:
    """(the row's id, the sampling with the seed that the prompt has under it)."""
    label = sampling_label(sampling)
    if not label:
        return prompt_id, sampling
    key = f"{sampling.seed}\0{prompt_id}\0{label}".encode()
    seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 2
    # drawn with noise keyed by seed and position, the text is the same for every arm
    return prompt_id + label, replace(sampling, seed=seed, method="invariant")


@dataclass(frozen=True, slots=True)
class Decoded:
    """A shard's worth of answers."""

    states: list[dict[str, Any]]  # rows of `target_hidden` features
    trajectories: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """Prompts to be decoded together and stored as one shard."""

    prompts: Sequence[EncodedPrompt]
    max_new_tokens: int

    def __len__(self) -> int:
        return len(self.prompts)

    def run(self, pace: Pace, tick: Tick) -> Decoded:
        began = perf_counter()
        stops = pace.stop_token_ids()
        found: dict[str, np.ndarray] = {}
        done: dict[str, Completion] = {}
        requests = [
            Request(p.id, p.tokens, self.max_new_tokens, p.sampling, stop_token_ids=stops)
            for p in self.prompts
        ]
        for completion in _recording_driver(pace.parts, found).generate(requests):
            if completion.error is not None:
                raise DecodingError(f"prompt '{completion.request_id}': {completion.error}")
            done[completion.request_id] = completion
            tick(1)
        _look_at_the_rest(pace.parts, {p.id: p.tokens for p in self.prompts}, found)
        rows = [self._trajectory(prompt, done[prompt.id]).row() for prompt in self.prompts]
        states = [feature_row(TargetHidden.name, p.id, found[p.id]) for p in self.prompts]
        return Decoded(states, rows, perf_counter() - began)

    def _trajectory(self, prompt: EncodedPrompt, completion: Completion) -> Trajectory:
        return Trajectory(
            id=prompt.id,
            domain=prompt.domain,
            prompt_tokens=prompt.tokens,
            output_tokens=tuple(completion.token_ids),
            finish_reason=completion.finish_reason,
            max_new_tokens=self.max_new_tokens,
            sampling=prompt.sampling,
        )


def encode_prompts(
    pace: Pace, encoder: Encoder, rows: Sequence[Trajectory]
) -> list[dict[str, Any]]:
    """Rows of an encoder's features of decoded prompts; at most a prefill of each."""
    if encoder.needs_prefill:
        found: dict[str, np.ndarray] = {}
        _look_at_the_rest(pace.parts, {row.id: row.prompt_tokens for row in rows}, found)
        return [feature_row(encoder.name, row.id, found[row.id]) for row in rows]
    return [feature_row(encoder.name, row.id, encoder.encode(_seen(pace, row))) for row in rows]


def _seen(pace: Pace, row: Trajectory) -> Context:
    """A request that is alone, without the target's states."""
    nothing = np.zeros(0, dtype=np.float32)
    return Context(
        prompt_tokens=row.prompt_tokens,
        mean_hidden=nothing,
        last_hidden=nothing,
        sampling=row.sampling,
        rows_in_flight=1,
        text=lambda: pace.parts.text(row.prompt_tokens),
    )


def feature_row(encoder: str, id: str, features: np.ndarray) -> dict[str, Any]:
    """Raises StoreError on a feature that is not a finite number."""
    if not np.isfinite(features).all():
        raise StoreError(
            f"prompt '{id}': a feature of '{encoder}' is not a finite number; the model behind it "
            "overflowed, try another dtype"
        )
    return {"id": id, "features": features}


def lone_driver(parts: Parts, model: LanguageModel, choose: Choose | None = None) -> Driver:
    """Make an engine in which a model decodes without drafters and without text."""
    section = parts.config.engine
    return Driver(
        Engine(
            model,
            {NONE: NoneDrafter()},
            decode=lambda tokens: "",
            choose=choose,
            max_rows=section.max_rows,
            prefill_chunk=section.prefill_chunk,
        )
    )


def _recording_driver(parts: Parts, found: dict[str, np.ndarray]) -> Driver:
    """The target alone; the states of requests with drafter "auto" go to `found` by id."""
    states = TargetHidden(parts.target.hidden_size)

    def choose(context: Context) -> Decision:
        found[context.request_id] = states.encode(context)
        return Decision(arm=NONE)

    return lone_driver(parts, parts.target, choose)


def _look_at_the_rest(
    parts: Parts, prompts: dict[str, tuple[int, ...]], found: dict[str, np.ndarray]
) -> None:
    """States of prompts that were not noted: the engine asks only where an answer goes on."""
    # two tokens and no stop, so that it does go on
    rest: Iterable[Request] = [
        Request(id, tokens, max_new_tokens=2) for id, tokens in prompts.items() if id not in found
    ]
    for _ in _recording_driver(parts, found).generate(rest):
        pass
