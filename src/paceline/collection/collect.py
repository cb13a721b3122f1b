"""Prompts to a collection: each prompt decoded once by the target, then every arm replayed on it.

Everything goes to the stores in small shards: a run that is stopped at any moment loses at most one
shard's work, and the next one continues to the same rows as a run that was never stopped. What is
collected knows no costs, so it can be priced on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from paceline.collection.replays import decode_drafters, replay_arms
from paceline.collection.trajectories import (
    EncodedPrompt,
    complete_features,
    decode_trajectories,
)
from paceline.contracts import NONE, identity_of_arms
from paceline.errors import ConfigError, StoreError
from paceline.selection.features import FEATURE_VERSION
from paceline.store import Collection
from paceline.store.collection import read_trajectories

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Pace
    from paceline.collection.trajectories import Progress
    from paceline.contracts import PromptRecord

SHARD_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """What a run did, in prompts."""

    num_prompts: int  # in the collection now
    num_present: int  # of those given, decoded by an earlier run
    num_decoded: int
    too_long: tuple[str, ...]  # ids left out, because the prompt fills the target's context
    num_replayed: dict[str, int]  # by arm
    num_draft_outputs: dict[str, int]  # by arm, where alignment was asked for

    @property
    def num_too_long(self) -> int:
        return len(self.too_long)


def collect(
    pace: Pace,
    prompts: Sequence[PromptRecord],
    folder: Path | str,
    max_new_tokens: int,
    alignment: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
    shard_size: int = SHARD_SIZE,
) -> CollectionReport:
    """Decode what the folder lacks of these prompts and replay every arm of `pace` on all of it.

    Prompts go through the chat template where the tokenizer has one; outputs are greedy and end as
    requests of `pace` do. `alignment` adds what each draft model writes on its own, for the
    alignment reward. on_progress(stage, done, total) counts prompts in the stages decode, features,
    replay and outputs. Raises ConfigError on an id given twice, StoreError if the folder was made
    with another target, tokenizer or version, or holds one of the ids with another prompt.
    """
    encoded, too_long = _encode(pace, prompts)
    parts = pace.parts
    none = identity_of_arms({NONE: parts.drafters[NONE].identity()})[NONE]
    collection = Collection(Path(folder), parts.target.fingerprint(), parts.vocabulary.hash(), none)
    features = collection.features(FEATURE_VERSION, parts.target.hidden_size)
    present = _check_present(collection, encoded)
    missing = [prompt for prompt in encoded if prompt.id not in present]
    # neighbours of like length waste little of a batch
    missing.sort(key=lambda prompt: (len(prompt.tokens), prompt.id))
    decode_trajectories(
        pace, missing, collection.trajectories, features, max_new_tokens, shard_size, on_progress
    )
    trajectories = read_trajectories(collection.trajectories)
    everything = [EncodedPrompt(t.id, t.domain, t.prompt_tokens) for t in trajectories]
    complete_features(parts, everything, features, shard_size, on_progress)
    replayed = replay_arms(parts, trajectories, collection, shard_size, on_progress)
    outputs = (
        decode_drafters(pace, trajectories, collection, shard_size, on_progress)
        if alignment
        else {}
    )
    return CollectionReport(
        num_prompts=len(trajectories),
        num_present=len(encoded) - len(missing),
        num_decoded=len(missing),
        too_long=too_long,
        num_replayed=replayed,
        num_draft_outputs=outputs,
    )


def _encode(
    pace: Pace, prompts: Sequence[PromptRecord]
) -> tuple[list[EncodedPrompt], tuple[str, ...]]:
    """(prompts as tokens, ids of those too long)."""
    as_messages = getattr(pace.parts.tokenizer, "chat_template", None) is not None
    encoded: list[EncodedPrompt] = []
    too_long: list[str] = []
    seen: set[str] = set()
    for record in prompts:
        if record.id in seen:
            raise ConfigError(f"prompt id '{record.id}' occurs twice; give every prompt its own id")
        seen.add(record.id)
        message = {"role": "user", "content": record.prompt}
        tokens = pace.encode([message] if as_messages else record.prompt)
        # in a full context the answer is one token, and nothing can be drafted
        if len(tokens) < pace.parts.target.context_length:
            encoded.append(EncodedPrompt(record.id, record.domain, tuple(tokens)))
        else:
            too_long.append(record.id)
    return encoded, tuple(too_long)


def _check_present(collection: Collection, prompts: Sequence[EncodedPrompt]) -> set[str]:
    """Ids that are there already. Raises StoreError if one of them is there with another prompt."""
    given = {prompt.id: prompt.tokens for prompt in prompts}
    present: set[str] = set()
    for there in read_trajectories(collection.trajectories):
        if given.get(there.id, there.prompt_tokens) != there.prompt_tokens:
            raise StoreError(
                f"{collection.folder}: '{there.id}' is there with another prompt; give the new "
                "prompt its own id, or collect into a new folder"
            )
        present.add(there.id)
    return present
