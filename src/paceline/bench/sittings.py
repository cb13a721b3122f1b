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
from paceline.drafting.contract import Draft, blaming, prepare_all
from paceline.drafting.draft_replay import cache_text
from paceline.engine import Driver, Engine
from paceline.engine.rows import Row
from paceline.engine.step import judge, propose, verify
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
# batches are measured more coarsely: the packed forward costs by its tokens, however they came about
_ROWS: Final = (1, 2, 4, 8, 16)
_CONTEXT_OF_ROWS: Final = 384  # the longest at which a batch verifies
_DRAFTS_OF_ROWS: Final = (1, 4, 16)
_PERIOD: Final = 7
_ENGINE_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured, within the target's context and the arms' draft lengths."""

    prompts: list[int]
    contexts: list[int]
    widths: list[int]
    rows: list[int]
    contexts_of_rows: list[int]

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
        of_rows = [c for c in contexts if c <= _CONTEXT_OF_ROWS]
        of_rows = sorted({of_rows[0], of_rows[-1]}) if of_rows else contexts[:1]
        engine = parts.config.engine
        most = engine.max_rows
        if engine.max_positions is not None:
            most = max(1, min(most, engine.max_positions // (max(contexts) + longest + 1)))
        rows = sorted({r for r in _ROWS if r <= most} | {min(most, _ROWS[-1])})
        return cls(prompts, contexts, sorted(widths), rows, of_rows)

    @property
    def contexts_of_drafts(self) -> list[int]:
        """Where drafters start and propose: less often than the target verifies, which costs more."""
        return sorted({*self.contexts[::2], self.contexts[-1]})

    @property
    def longest(self) -> int:
        """The most tokens an arm drafts."""
        return self.widths[-1] - 1

    @staticmethod
    def drafts(drafter: Drafter) -> list[int]:
        """Draft lengths to ask of an arm."""
        longest = drafter.num_draft_tokens
        return sorted({k for k in _DRAFTS if k <= longest} | {longest})


def all_sittings(parts: Parts, grid: Grid, rows: Sequence[Row]) -> list[Sitting]:
    """rows: as `cached_rows` gives them."""
    driver = Driver(
        Engine(
            parts.target,
            parts.drafters,
            decode=lambda tokens: "",
            max_rows=grid.rows[-1],
            prefill_chunk=parts.config.engine.prefill_chunk,
        )
    )
    arms = [name for name in parts.drafters if name != NONE]
    found: list[Sitting] = []
    for context in grid.contexts:
        shapes = [[width - 1] for width in grid.widths]
        found.append(partial(_forwards, parts, rows, context, shapes))
    for context in grid.contexts_of_rows:
        shapes = [shape for num in grid.rows[1:] for shape in _shapes(num, grid.longest)]
        found.append(partial(_forwards, parts, rows, context, shapes))
    found += [partial(_prefill, parts, driver, n) for n in grid.prompts]
    for name in arms:
        found += [partial(_drafts, parts, grid, rows[0], name, n) for n in grid.contexts_of_drafts]
        found.append(partial(_drafts_of_rows, parts, grid, rows[0], name))
    found += [partial(_rounds, parts, driver, name, 1) for name in [NONE, *arms[:1]]]
    found += [partial(_rounds, parts, driver, NONE, num) for num in grid.rows[1:]]
    return found


def _shapes(num_rows: int, longest: int) -> list[list[int]]:
    """How much each of some rows drafts: none anything, one of them, or all alike."""
    lengths = {min(length, longest) for length in _DRAFTS_OF_ROWS} - {0}
    alone = [[max(lengths), *[0] * (num_rows - 1)]] if lengths else []
    return [[0] * num_rows, *alone, *([length] * num_rows for length in sorted(lengths))]


def _forwards(
    parts: Parts,
    rows: Sequence[Row],
    context: int,
    shapes: Sequence[Sequence[int]],
    repeat: int,
    order: random.Random,
) -> list[tuple[Cell, float]]:
    """Verification as in a round: forward, unembedding and judging of all rows' tokens.

    shapes: how many tokens each of the first rows drafts.
    """
    found: list[tuple[Cell, float]] = []
    for shape in order.sample(shapes, len(shapes)):
        with _cut(rows[: len(shape)], context) as cut:
            chains = [Draft(_text(parts, length, order)) for length in shape]
            began = perf_counter()
            judge(cut, chains, verify(cut, chains, parts.target)[1])
            cell = (TARGET, FORWARD, 1 + sum(shape), context, len(shape))
            found.append((cell, perf_counter() - began))
    return found


@contextmanager
def _cut(rows: Sequence[Row], context: int) -> Iterator[Sequence[Row]]:
    """Cached rows as if their texts ended one token behind `context`."""
    texts = [row.tokens for row in rows]
    for row, text in zip(rows, texts, strict=True):
        row.tokens = text[: context + 1]
    yield rows
    for row, text in zip(rows, texts, strict=True):
        row.tokens = text


def _prefill(
    parts: Parts, driver: Driver, num_prompt: int, repeat: int, order: random.Random
) -> list[tuple[Cell, float]]:
    request = Request("", tuple(_text(parts, num_prompt, order)), 1, drafter=NONE)
    (completion,) = driver.generate([request])
    return [((TARGET, PREFILL, num_prompt, 0, 1), completion.seconds.prefill)]


def _drafts(
    parts: Parts,
    grid: Grid,
    cached: Row,
    arm: str,
    num_prompt: int,
    repeat: int,
    order: random.Random,
) -> list[tuple[Cell, float]]:
    """A drafter's start on a prompt, then drafts of every length, with a token between them."""
    drafter = parts.drafters[arm]
    text = _text(parts, num_prompt + len(_DRAFTS) + 3, order, _period(repeat))
    found: list[tuple[Cell, float]] = []
    with _started(parts, drafter, [text[: num_prompt + 1]], cached) as (rows, seconds):
        found.append(((arm, START, num_prompt, 0, 1), seconds))
        lengths = grid.drafts(drafter)
        for length in order.sample(lengths, len(lengths)):
            drafted, spent = _propose(parts, rows, length, cached)
            found.append(((arm, PROPOSE, drafted, num_prompt, 1), spent))
            _go_on(parts, rows, [text[len(rows[0].tokens)]])
    return found


def _drafts_of_rows(
    parts: Parts, grid: Grid, cached: Row, arm: str, repeat: int, order: random.Random
) -> list[tuple[Cell, float]]:
    """Drafts of several rows at once, at the shortest context: more rows by and by."""
    drafter, context = parts.drafters[arm], grid.contexts[0]
    lengths = sorted({1, drafter.num_draft_tokens})
    room = context + 3 + len(lengths) * len(grid.rows)
    texts = [_text(parts, room, order, _period(repeat)) for _ in range(grid.rows[-1])]
    found: list[tuple[Cell, float]] = []
    with _started(parts, drafter, [t[: context + 1] for t in texts], cached) as (rows, _):
        for num in grid.rows[1:]:
            for length in order.sample(lengths, len(lengths)):
                drafted, spent = _propose(parts, rows[:num], length, cached)
                found.append(((arm, PROPOSE, drafted, context, num), spent))
                _go_on(parts, rows, [text[len(rows[0].tokens)] for text in texts])
    return found


@contextmanager
def _started(
    parts: Parts, drafter: Drafter, texts: Sequence[list[int]], cached: Row
) -> Iterator[tuple[list[Row], float]]:
    """Rows of a drafter behind its own prefill, and the seconds that this took."""
    rows = [_row(drafter, text, -1 - i) for i, text in enumerate(texts)]
    try:
        for row in rows:
            if drafter.needs.target_weights:
                row.slot = parts.target.acquire()
                _cache(parts, row, len(row.tokens) - 1)
        _forget(parts, cached)
        began = perf_counter()
        for row in rows:
            with blaming(row.drafter_name):
                drafter.start([row])
                prepare_all(drafter, row, parts.config.engine.prefill_chunk)
        _settle(parts)
        yield rows, perf_counter() - began
    finally:
        drafter.finish(rows)
        for row in rows:
            if row.slot >= 0:
                parts.target.release(row.slot)


def _propose(parts: Parts, rows: list[Row], length: int, cached: Row) -> tuple[int, float]:
    """(tokens that a row drafted, seconds) of one proposal for all rows."""
    for row in rows:
        row.max_total = len(row.tokens) + 1 + length
    _forget(parts, cached)
    with rows[0].drafter.at_full_length():
        began = perf_counter()
        drafted = [len(draft.tokens) for draft in propose(rows, parts.target.num_logits)]
        spent = perf_counter() - began
    error = next((row.error for row in rows if row.error is not None), None)
    if error is not None:
        raise DrafterError(error)
    return round(sum(drafted) / len(rows)), spent


def _forget(parts: Parts, cached: Row) -> None:
    """A forward of the target, as between two drafts: it takes a small drafter's weights out of the
    processor's caches, without which the drafter would look a third cheaper than it is.
    """
    verify([cached], [Draft([])], parts.target)
    _settle(parts)


def _go_on(parts: Parts, rows: Sequence[Row], tokens: Sequence[int]) -> None:
    """Each row's text one token longer."""
    for row, token in zip(rows, tokens, strict=True):
        row.tokens.append(token)
        if row.drafter.needs.target_weights:
            _cache(parts, row, len(row.tokens) - 1)


def _rounds(
    parts: Parts, driver: Driver, arm: str, num_rows: int, repeat: int, order: random.Random
) -> list[tuple[Cell, float]]:
    """Host seconds a round: the engine's clock less its prefill, choice, drafts and forwards."""
    num_prompt = min(16, parts.target.context_length)
    requests = [
        Request("", tuple(_text(parts, num_prompt, order)), _ENGINE_TOKENS, drafter=arm)
        for _ in range(num_rows)
    ]
    with parts.drafters[arm].at_full_length():
        done = list(driver.generate(requests))
    work = sum(c.seconds.total - c.seconds.commit for c in done)
    host = max(0.0, max(c.seconds_total for c in done) - work)
    return [((ENGINE, ROUND, 0, 0, num_rows), host / max(1, *(len(c.rounds) for c in done)))]


@contextmanager
def cached_rows(parts: Parts, grid: Grid) -> Iterator[list[Row]]:
    """Rows whose text is in the target's cache: the first up to the longest context."""
    target = parts.target
    rows: list[Row] = []
    try:
        for number in range(grid.rows[-1]):
            length = max(grid.contexts_of_rows if number else grid.contexts)
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


def _row(drafter: Drafter, tokens: list[int], id: int = -1) -> Row:
    """id: below zero, since the engine counts its rows from there. The row has no slot yet."""
    return Row(id, Request("", (), 1), -1, len(tokens), 0.0, tokens, drafter, drafter.name)


def _period(repeat: int) -> int | None:
    return None if repeat % 2 else _PERIOD


def _text(parts: Parts, length: int, order: random.Random, period: int | None = None) -> list[int]:
    """Random ids that exist in the vocabulary; with a period, the same few again and again."""
    num_tokens = min(parts.vocabulary.num_tokens, parts.target.num_logits)
    drawn = [order.randrange(num_tokens) for _ in range(period or length)]
    return list(islice(cycle(drawn), length))


def _settle(parts: Parts) -> None:
    """Wait for a device that works behind the host's back."""
    if parts.target.device.type != "cpu":
        torch.accelerator.synchronize()
