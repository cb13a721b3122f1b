"""Decode prompts with the target alone, and store the features that a policy would see of each.

Features of the target's hidden states cost no extra forward: the engine asks for a choice after the
prefill, and the answer here is always `none`. Other encoders read only the prompt and run on stored
rows. The prompts of a task are stored together in their order, so that shards do not depend on which
request ended first. Knows no drafters and no costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.bench.cost_measurement import plain_driver
from paceline.contracts import NONE, Context, Decision, Request
from paceline.errors import DecodingError, StoreError
from paceline.selection.encoders import TargetHidden
from paceline.store.layout import Trajectory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.assembly import Pace, Parts
    from paceline.collection.workers import OnDone
    from paceline.contracts import Completion, SamplingParams
    from paceline.engine import Driver
    from paceline.selection.encoders import Encoder


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt in the target's tokens, under one sampling; `id` is the row's."""

    id: str
    domain: str
    tokens: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class DecodedShard:
    """The rows of one shard of answers."""

    hidden_features: list[dict[str, Any]]  # rows of the encoder `target_hidden`
    trajectories: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """Prompts to be decoded together and stored as one shard."""

    prompts: Sequence[EncodedPrompt]
    max_new_tokens: int

    def __len__(self) -> int:
        return len(self.prompts)

    def run(self, pace: Pace, on_done: OnDone) -> DecodedShard:
        """Decode the prompts. Raises DecodingError if a request fails."""
        began = perf_counter()
        stops = pace.stop_token_ids()
        features: dict[str, np.ndarray] = {}
        answers: dict[str, Completion] = {}
        requests = [
            Request(p.id, p.tokens, self.max_new_tokens, p.sampling, stop_token_ids=stops)
            for p in self.prompts
        ]
        for completion in _recording_driver(pace.parts, features).generate(requests):
            if completion.error is not None:
                raise DecodingError(f"prompt '{completion.request_id}': {completion.error}")
            answers[completion.request_id] = completion
            on_done(1)
        _record_missing(pace.parts, {p.id: p.tokens for p in self.prompts}, features)
        trajectories = [
            Trajectory(
                id=prompt.id,
                domain=prompt.domain,
                prompt_tokens=prompt.tokens,
                output_tokens=tuple(answers[prompt.id].token_ids),
                finish_reason=answers[prompt.id].finish_reason,
                max_new_tokens=self.max_new_tokens,
                sampling=prompt.sampling,
            ).to_row()
            for prompt in self.prompts
        ]
        rows = [feature_row(TargetHidden.name, p.id, features[p.id]) for p in self.prompts]
        return DecodedShard(rows, trajectories, perf_counter() - began)


def encode_prompts(
    pace: Pace, encoder: Encoder, rows: Sequence[Trajectory]
) -> list[dict[str, Any]]:
    """Return rows of an encoder's features of decoded prompts; costs at most one prefill each."""
    features: dict[str, np.ndarray] = {}
    if encoder.needs_prefill:
        _record_missing(pace.parts, {row.id: row.prompt_tokens for row in rows}, features)
    else:
        features = {row.id: encoder.encode(_context_of(pace, row)) for row in rows}
    return [feature_row(encoder.name, row.id, features[row.id]) for row in rows]


def _context_of(pace: Pace, row: Trajectory) -> Context:
    """Return the context of a request that runs alone, without the target's hidden states."""
    no_hidden = np.zeros(0, dtype=np.float32)
    return Context(
        prompt_tokens=row.prompt_tokens,
        mean_hidden=no_hidden,
        last_hidden=no_hidden,
        sampling=row.sampling,
        rows_in_flight=1,
        text=lambda: pace.parts.text(row.prompt_tokens),
    )


def feature_row(encoder: str, id: str, features: np.ndarray) -> dict[str, Any]:
    """Return one row of features. Raises StoreError on a feature that is not a finite number."""
    if not np.isfinite(features).all():
        raise StoreError(
            f"prompt '{id}': a feature of '{encoder}' is not a finite number; its model overflowed, "
            "try another dtype"
        )
    return {"id": id, "features": features}


def _recording_driver(parts: Parts, features: dict[str, np.ndarray]) -> Driver:
    """Build a driver of the target alone that adds each request's hidden features, by id."""
    encoder = TargetHidden(parts.target.hidden_size)

    def choose(context: Context) -> Decision:
        features[context.request_id] = encoder.encode(context)
        return Decision(arm=NONE)

    max_rows = parts.config.engine.max_rows
    return plain_driver(parts, max_rows, {NONE: parts.drafters[NONE]}, choose=choose)


def _record_missing(
    parts: Parts, prompts: Mapping[str, tuple[int, ...]], features: dict[str, np.ndarray]
) -> None:
    """Add the hidden features of prompts that have none: the engine asks for a choice only where an
    answer continues after its first token.
    """
    # two tokens and no stop, so that the answer continues
    requests = [
        Request(id, tokens, max_new_tokens=2)
        for id, tokens in prompts.items()
        if id not in features
    ]
    for _ in _recording_driver(parts, features).generate(requests):
        pass
