"""Rows without a request, cached by the target, for the workloads of the cost table.

Their texts are random ids. Of a target with an encoder, half of a context is the source.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from itertools import cycle, islice
from typing import TYPE_CHECKING

from paceline.contracts import NONE, Request
from paceline.drafting.draft_replay import cache_text
from paceline.engine.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.assembly import Parts
    from paceline.drafting.base import Drafter


@contextmanager
def cached_rows(parts: Parts, lengths: Sequence[int]) -> Iterator[list[Row]]:
    """Give rows with this many tokens of random text in the target's cache, and one token more."""
    rows: list[Row] = []
    try:
        for length in lengths:
            row = row_of(parts.drafters[NONE], random_text(parts, length + 1, random.Random(0)))
            row.slot = parts.target.acquire()
            rows.append(row)
            _cache(parts, row, length)
        yield rows
    finally:
        for row in rows:
            parts.target.release(row.slot)


def _cache(parts: Parts, row: Row, length: int) -> None:
    """Put the row's first `length` tokens into the target's cache, unless they are there already."""
    chunk, cached = parts.config.engine.prefill_chunk, row.num_cached
    split_context(parts, row, length)
    cache_text(parts.target, row.slot, row.tokens[:length], row.num_prompt, chunk, cached)


def row_of(drafter: Drafter, tokens: list[int], id: int = -1) -> Row:
    """Return a row without a slot. id: negative, because the engine counts its rows from 0."""
    return Row(id, Request("", (), 1), -1, len(tokens), 0.0, tokens, drafter, drafter.name)


def random_text(
    parts: Parts, length: int, order: random.Random, period: int | None = None
) -> list[int]:
    """Return random ids of the vocabulary; with a period, the same few again and again."""
    num_tokens = min(parts.vocabulary.num_tokens, parts.target.num_logits)
    drawn = [order.randrange(num_tokens) for _ in range(period or length)]
    return list(islice(cycle(drawn), length))


@contextmanager
def shortened(parts: Parts, rows: Sequence[Row], context: int) -> Iterator[Sequence[Row]]:
    """Shorten the texts of cached rows to one token more than `context`, for a while."""
    whole = [(row.tokens, row.num_prompt, row.num_cached) for row in rows]
    for row in rows:
        row.tokens = row.tokens[: context + 1]
        split_context(parts, row, context)
        if parts.target.encoder is not None:
            parts.target.begin(row.slot, row.tokens[: row.num_prompt])
    yield rows
    for row, (text, num_prompt, num_cached) in zip(rows, whole, strict=True):
        row.tokens, row.num_prompt, row.num_cached, row.arm = text, num_prompt, num_cached, NONE


def split_context(parts: Parts, row: Row, context: int) -> None:
    """Make half of a context the source of a row, if the target has an encoder; count its positions."""
    if parts.target.reads_prompt_as_source:
        row.num_prompt = max(1, context // 2)
        row.start = parts.target.text_of(row.tokens[: row.num_prompt], row.num_prompt)
    row.num_cached = row.positions_of(context + 1)


def read_sources(parts: Parts, rows: Sequence[Row], cached: Sequence[Row]) -> None:
    """Let the target's encoder read the sources of rows that take the slots of cached ones."""
    if parts.target.encoder is not None:
        for row, _ in zip(rows, cached, strict=False):
            parts.target.begin(row.slot, row.tokens[: row.num_prompt])
