"""Decode prompts with the target alone, and note what a policy would have seen of each.

The features come with the decoding: the engine asks for a choice after the prefill, and the answer
here is always `none`. A part of the prompts is stored whole, in the prompts' order, so that the
shards do not depend on which request ended first. Knows no drafters and no costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from paceline.contracts import NONE, Decision, Request
from paceline.drafting.none import NoneDrafter
from paceline.engine import Engine
from paceline.selection.features import feature_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    from paceline.assembly import Pace, Parts
    from paceline.contracts import Completion, Context
    from paceline.engine.loop import Choose
    from paceline.models.language_model import LanguageModel
    from paceline.store import ShardStore

    Progress = Callable[[str, int, int], None]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the target reads it."""

    id: str
    domain: str
    tokens: tuple[int, ...]


def parts_of(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Neighbours in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def decode_trajectories(
    pace: Pace,
    prompts: Sequence[EncodedPrompt],
    trajectories: ShardStore,
    features: ShardStore,
    max_new_tokens: int,
    shard_size: int,
    on_progress: Progress,
) -> None:
    """Greedy outputs of the prompts, which `trajectories` must lack, with the features of each."""
    stops = pace.stop_token_ids()
    noted = features.ids()
    done = 0
    for part in parts_of(prompts, shard_size):
        found: dict[str, np.ndarray] = {}
        completions: dict[str, Completion] = {}
        requests = [Request(p.id, p.tokens, max_new_tokens, stop_token_ids=stops) for p in part]
        for completion in _recording_engine(pace.parts, found).generate(requests):
            completions[completion.request_id] = completion
            done += 1
            on_progress("decode", done, len(prompts))
        _look_at_the_rest(pace.parts, part, found)
        # features first: a run that is stopped between the two decodes this part again, to the
        # same end, and does not write them twice
        features.append([_feature_row(p.id, found) for p in part if p.id not in noted])
        trajectories.append([_trajectory_row(p, completions[p.id], max_new_tokens) for p in part])


def complete_features(
    parts: Parts,
    prompts: Sequence[EncodedPrompt],
    features: ShardStore,
    shard_size: int,
    on_progress: Progress,
) -> None:
    """Features the store lacks, as it does where it is younger than the trajectories."""
    noted = features.ids()
    missing = [prompt for prompt in prompts if prompt.id not in noted]
    done = 0
    for part in parts_of(missing, shard_size):
        found: dict[str, np.ndarray] = {}
        _look_at_the_rest(parts, part, found)
        features.append([_feature_row(prompt.id, found) for prompt in part])
        done += len(part)
        on_progress("features", done, len(missing))


def lone_engine(parts: Parts, model: LanguageModel, choose: Choose | None = None) -> Engine:
    """An engine in which a model decodes without drafters and nobody reads the text."""
    section = parts.config.engine
    return Engine(
        model,
        {NONE: NoneDrafter()},
        decode=lambda tokens: "",
        choose=choose,
        max_rows=section.max_rows,
        prefill_chunk=section.prefill_chunk,
    )


def _recording_engine(parts: Parts, found: dict[str, np.ndarray]) -> Engine:
    """The target alone; the features of requests with drafter "auto" go to `found` by id."""

    def choose(context: Context) -> Decision:
        # rows share the batch here for speed only; a request that is served is alone until it isn't
        found[context.request_id] = feature_vector(replace(context, rows_in_flight=1))
        return Decision(arm=NONE)

    return lone_engine(parts, parts.target, choose)


def _look_at_the_rest(
    parts: Parts, prompts: Sequence[EncodedPrompt], found: dict[str, np.ndarray]
) -> None:
    """Features of prompts that were not noted: the engine asks only where an answer goes on."""
    rest = [p for p in prompts if p.id not in found]
    # two tokens and no stop, so that it does go on
    requests = [Request(p.id, p.tokens, max_new_tokens=2) for p in rest]
    for _ in _recording_engine(parts, found).generate(requests):
        pass


def _feature_row(id: str, found: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"id": id, "features": found[id]}


def _trajectory_row(
    prompt: EncodedPrompt, completion: Completion, max_new_tokens: int
) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "domain": prompt.domain,
        "prompt_tokens": prompt.tokens,
        "output_tokens": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "max_new_tokens": max_new_tokens,
        "temperature": 0.0,
    }
