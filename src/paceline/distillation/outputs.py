"""The target's answers to training prompts, which a drafter learns to predict.

paceline's engine decodes them greedily in batches into one shard store per data file, so a killed run
resumes and several drafters share the answers. A cap selects the prompts with the lowest hashes: a
larger cap adds prompts and removes none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from paceline.contracts import NONE
from paceline.distillation.batches import Example
from paceline.store import ShardStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from paceline.assembly import Pace
    from paceline.contracts import PromptRecord

KIND = "outputs"
OUTPUT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("output_tokens", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)


def open_outputs(pace: Pace, folder: Path, max_new_tokens: int) -> ShardStore:
    """Return the store of this target's answers. Raises StoreError for another target's or limit's."""
    identity = {
        "target": pace.parts.target.fingerprint(),
        "tokenizer": pace.parts.vocabulary.hash(),
        "max_new_tokens": max_new_tokens,
    }
    return ShardStore(folder, KIND, OUTPUT_SCHEMA, identity)


def read_examples(store: ShardStore, prompts: Sequence[PromptRecord]) -> list[Example]:
    """Return the texts of the prompts that have an answer, in the order of `prompts`."""
    table = store.read()
    row_of = {id: i for i, id in enumerate(table.column("id").to_pylist())}
    prompt_tokens = table.column("prompt_tokens").to_pylist()
    output_tokens = table.column("output_tokens").to_pylist()
    examples = []
    for record in prompts:
        i = row_of.get(record.id)
        if i is None or not output_tokens[i]:
            continue
        tokens = np.array(prompt_tokens[i] + output_tokens[i], dtype=np.int64)
        examples.append(Example(record.id, record.domain, tokens, len(prompt_tokens[i])))
    return examples


def decode_outputs(
    pace: Pace,
    prompts: Sequence[PromptRecord],
    store: ShardStore,
    max_new_tokens: int,
    shard_size: int = 512,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Decode the prompts that are not in the store, except those too long for the target's context."""
    remaining = _encode_remaining(pace, prompts, store)
    for first in range(0, len(remaining), shard_size):
        part = remaining[first : first + shard_size]
        requests = [
            pace.request(
                t, id=r.id, max_new_tokens=max_new_tokens, drafter=NONE, generation_config="none"
            )
            for r, t in part
        ]
        domains = {record.id: record.domain for record, _ in part}
        prompt_tokens = {record.id: tokens for record, tokens in part}
        rows = []
        for completion in pace.stream(requests):
            rows.append(
                {
                    "id": completion.request_id,
                    "domain": domains[completion.request_id],
                    "prompt_tokens": prompt_tokens[completion.request_id],
                    "output_tokens": completion.token_ids,
                    "finish_reason": completion.finish_reason,
                }
            )
            on_done()
        store.append(rows)


def _encode_remaining(
    pace: Pace, prompts: Sequence[PromptRecord], store: ShardStore
) -> list[tuple[PromptRecord, list[int]]]:
    """Return the prompts to decode with their tokens, in order of length."""
    stored = store.ids()
    remaining = []
    for record in prompts:
        if record.id in stored:
            continue
        tokens = pace.encode([{"role": "user", "content": record.prompt}])
        if len(tokens) < pace.parts.target.context_length:
            remaining.append((record, tokens))
    return sorted(remaining, key=lambda item: len(item[1]))  # rows of similar length end together
