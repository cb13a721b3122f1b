"""The target's own answers to training prompts: what a drafter learns to predict.

Greedy answers decoded in batches with paceline's engine, kept in a shard store, so a killed run
resumes where it stopped and several drafters share one decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from paceline.contracts import NONE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.assembly import Pace
    from paceline.contracts import PromptRecord
    from paceline.store import ShardStore

OUTPUT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("output_tokens", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)


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
            pace.request(t, id=r.id, max_new_tokens=max_new_tokens, drafter=NONE) for r, t in part
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
