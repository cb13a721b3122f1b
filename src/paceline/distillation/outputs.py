"""The target's own answers to training prompts: what a drafter learns to predict.

Greedy answers decoded in batches with paceline's engine, kept in a shard store a data file, so a
killed run resumes where it stopped and several drafters share one decoding. A cap keeps the prompts
whose hashes are lowest: a larger cap adds prompts and drops none.
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
    """The store of this target's answers; another target's or another limit's is refused."""
    identity = {
        "target": pace.parts.target.fingerprint(),
        "tokenizer": pace.parts.vocabulary.hash(),
        "max_new_tokens": max_new_tokens,
    }
    return ShardStore(folder, KIND, OUTPUT_SCHEMA, identity)


def read_examples(store: ShardStore, prompts: Sequence[PromptRecord]) -> list[Example]:
    """The decoded ones of these prompts, in the order of `prompts`."""
    table = store.read()
    place = {id: i for i, id in enumerate(table.column("id").to_pylist())}
    columns = [table.column(name).to_pylist() for name in ("prompt_tokens", "output_tokens")]
    examples = []
    for record in prompts:
        i = place.get(record.id)
        if i is None or not columns[1][i]:
            continue
        tokens = np.array(columns[0][i] + columns[1][i], dtype=np.int64)
        examples.append(Example(record.id, record.domain, tokens, len(columns[0][i])))
    return examples


def decode_outputs(
    pace: Pace,
    prompts: Sequence[PromptRecord],
    store: ShardStore,
    max_new_tokens: int,
    shard_size: int = 512,
    on_done: Callable[[int], None] = lambda n: None,
) -> None:
    """Decode the prompts that the store lacks. Prompts too long for the context are left out."""
    done = store.ids()
    context = pace.parts.target.context_length
    todo = []
    for record in prompts:
        if record.id in done:
            continue
        tokens = pace.encode([{"role": "user", "content": record.prompt}])
        if len(tokens) < context:
            todo.append((record, tokens))
    # neighbours of like length waste little of a batch
    todo.sort(key=lambda item: len(item[1]))
    for first in range(0, len(todo), shard_size):
        part = todo[first : first + shard_size]
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
            on_done(1)
        store.append(rows)
