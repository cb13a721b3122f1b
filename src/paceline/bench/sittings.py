"""Pieces of work as the engine does them, on stand-in rows, timed one by one for the cost table.

A sitting prepares some work and times several cells of it, so preparing is paid once. Texts are
random ids, in every other repeat a few ids over and over, where lookup drafters find something to
propose. Knows no prompts and no statistics. A width is 1 + drafted tokens.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from time import perf_counter
from typing import TYPE_CHECKING, Final

import torch

from paceline.contracts import NONE, Request
from paceline.costs.table import ENGINE, FORWARD, PREFILL, PROPOSE, ROUND, START, TARGET
from paceline.drafting.foresight import cache_text
from paceline.engine import Engine
from paceline.engine.rows import Row
from paceline.engine.step import Draft, judge, propose, verify
from paceline.errors import DrafterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from paceline.assembly import Parts
    from paceline.drafting.base import Drafter

    Cell = tuple[str, str, int, int, int]  # subject, operation, tokens, context, rows
    Sitting = Callable[[int, random.Random], list[tuple[Cell, float]]]  # given the repeat

_PROMPTS: Final = (16, 64, 128, 256, 512)  # and the context's limit
_LONGEST_PROMPT: Final = 1024  # beyond it the table's last segment goes on
_CONTEXTS: Final = (32, 128, 384, 768)
_WIDTHS: Final = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32, 48, 65)
_DRAFTS: Final = (0, 1, 2, 4, 8, 16, 32, 64)
_ROWS: Final = 4  # the batch that is measured beside single rows, at the widths below
_WIDTHS_OF_ROWS: Final = (1, 5)
_PERIOD: Final = 7
_ENGINE_TOKENS: Final = 32
_FEWEST, _MOST = 3, 20  # repeats


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured, within the target's context and the arms' draft lengths."""

    prompts: list[int]
    contexts: list[int]
    widths: list[int]

    @classmethod
    def of(cls, parts: Parts) -> Grid:
        lengths = [drafter.num_draft_tokens for drafter in parts.drafters.values()]
        longest = max(lengths)
        widths = {w for w in _WIDTHS if w <= longest + 1} | {1 + k for k in lengths}
        context = parts.target.context_length
        # a sitting of drafts goes on from its context by a token each
        room = context - longest - len(_DRAFTS) - 2
        contexts = [c for c in _CONTEXTS if c <= room] or [max(1, room)]
        limit = min(context, _LONGEST_PROMPT)
        prompts = [n for n in _PROMPTS if n < limit] + [limit]
        return cls(prompts, contexts, sorted(widths))

    @staticmethod
    def drafts(drafter: Drafter) -> list[int]:
        """Draft lengths to ask of an arm."""
        longest = drafter.num_draft_tokens
        return sorted({k for k in _DRAFTS if k <= longest} | {longest})


def all_sittings(parts: Parts, grid: Grid, rows: Sequence[Row]) -> list[Sitting]:
    engine = Engine(
        parts.target,
        parts.drafters,
        decode=lambda tokens: "",
        prefill_chunk=parts.config.engine.prefill_chunk,
    )
    found: list[Sitting] = []
    for context in grid.contexts:
        found.append(partial(_forwards, parts, rows[:1], context, grid.widths))
        found.append(partial(_forwards, parts, rows, context, _WIDTHS_OF_ROWS))
    found += [partial(_prefill, parts, engine, n) for n in grid.prompts]
    arms = [name for name in parts.drafters if name != NONE]
    for name in arms:
        lengths = sorted({*grid.prompts, *grid.contexts})
        found += [partial(_drafts, parts, grid, name, n) for n in lengths]
    found += [partial(_rounds, parts, engine, name) for name in [NONE, *arms[:1]]]
    return found


def _forwards(
    parts: Parts,
    rows: Sequence[Row],
    context: int,
    widths: Sequence[int],
    repeat: int,
    order: random.Random,
) -> list[tuple[Cell, float]]:
    """Verification as in a round: forward, unembedding and judging of all rows' tokens."""
    found: list[tuple[Cell, float]] = []
    texts = [row.tokens for row in rows]
    for row, text in zip(rows, texts, strict=True):
        row.tokens = text[: context + 1]
    for width in order.sample(widths, len(widths)):
        drafts = [_text(parts, width - 1, order) for _ in rows]
        chains = [Draft(draft) for draft in drafts]
        began = perf_counter()
        judge(rows, chains, verify(rows, chains, parts.target)[1])
        cell = (TARGET, FORWARD, width, context, len(rows))
        found.append((cell, perf_counter() - began))
    for row, text in zip(rows, texts, strict=True):
        row.tokens = text
    return found


def _prefill(
    parts: Parts, engine: Engine, num_prompt: int, repeat: int, order: random.Random
) -> list[tuple[Cell, float]]:
    request = Request("", tuple(_text(parts, num_prompt, order)), 1, drafter=NONE)
    (completion,) = engine.generate([request])
    return [((TARGET, PREFILL, num_prompt, 0, 1), completion.seconds.prefill)]


def _drafts(
    parts: Parts, grid: Grid, arm: str, num_prompt: int, repeat: int, order: random.Random
) -> list[tuple[Cell, float]]:
    """A drafter's start on a prompt, then drafts of every length, with a token between them."""
    drafter = parts.drafters[arm]
    period = None if repeat % 2 else _PERIOD
    text = _text(parts, num_prompt + len(_DRAFTS) + 3, order, period)
    row = _row(drafter, text[: num_prompt + 1])
    found: list[tuple[Cell, float]] = []
    if drafter.needs.target_weights:
        row.slot = parts.target.acquire()
        _cache(parts, row, num_prompt)
    try:
        began = perf_counter()
        drafter.start([row])
        while not drafter.prepare(row, parts.config.engine.prefill_chunk):
            pass
        _settle(parts)
        found.append(((arm, START, num_prompt, 0, 1), perf_counter() - began))
        lengths = grid.drafts(drafter) if num_prompt in grid.contexts else []
        for length in order.sample(lengths, len(lengths)):
            row.max_total = len(row.tokens) + 1 + length
            with drafter.at_full_length():
                began = perf_counter()
                drafted = len(propose([row])[0].tokens)
                spent = perf_counter() - began
            if row.error is not None:
                raise DrafterError(row.error)
            found.append(((arm, PROPOSE, drafted, num_prompt, 1), spent))
            row.tokens.append(text[len(row.tokens)])
            if drafter.needs.target_weights:
                _cache(parts, row, len(row.tokens) - 1)
    finally:
        drafter.finish([row])
        if drafter.needs.target_weights:
            parts.target.release(row.slot)
    return found


def _rounds(
    parts: Parts, engine: Engine, arm: str, repeat: int, order: random.Random
) -> list[tuple[Cell, float]]:
    """Host seconds a round: the engine's clock less its prefill, choice, drafts and forwards."""
    num_prompt = min(16, parts.target.context_length)
    request = Request("", tuple(_text(parts, num_prompt, order)), _ENGINE_TOKENS, drafter=arm)
    with parts.drafters[arm].at_full_length():
        (completion,) = engine.generate([request])
    spent = completion.seconds
    work = spent.prefill + spent.choose + spent.draft + spent.verify
    host = max(0.0, completion.seconds_total - work) / max(1, len(completion.rounds))
    return [((ENGINE, ROUND, 0, 0, 1), host)]


@contextmanager
def cached_rows(parts: Parts, grid: Grid) -> Iterator[list[Row]]:
    """Rows whose text is in the target's cache up to the longest context."""
    target = parts.target
    length = max(grid.contexts)
    rows = []
    try:
        for _ in range(_ROWS):
            row = _row(parts.drafters[NONE], _text(parts, length + 1, random.Random(0)))
            row.slot = target.acquire()
            rows.append(row)
            _cache(parts, row, length)
        yield rows
    finally:
        for row in rows:
            target.release(row.slot)


def _cache(parts: Parts, row: Row, length: int) -> None:
    """Put the row's first `length` tokens into the target's cache, those there already but once."""
    chunk = parts.config.engine.prefill_chunk
    cache_text(parts.target, row.slot, row.tokens[:length], 0, chunk, row.num_prefilled)
    row.num_prefilled = length


def _row(drafter: Drafter, tokens: list[int]) -> Row:
    request = Request("", (), 1)
    # the engine counts its rows from 0
    return Row(-1, request, 0, len(tokens), 0.0, tokens, drafter)


def _text(parts: Parts, length: int, order: random.Random, period: int | None = None) -> list[int]:
    """Random ids that exist in the vocabulary; with a period, the same few again and again."""
    num_tokens = min(parts.vocabulary.num_tokens, parts.target.num_logits)
    drawn = [order.randrange(num_tokens) for _ in range(period or length)]
    return list(islice(cycle(drawn), length))


def _settle(parts: Parts) -> None:
    """Wait for a device that works behind the host's back."""
    if parts.target.device.type != "cpu":
        torch.accelerator.synchronize()
