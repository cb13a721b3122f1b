"""Workloads for the cost table: rounds of the engine on rows without a request, timed by their parts.

A workload prepares its rows once and then times several cells of the table. A cell repeats its round, as
a request does, and the first time does not count. Texts are random ids. In every other repeat they are a
few ids again and again, so that lookup drafters find something to propose. Of a target with an encoder,
half of a context is the source. This module knows no prompts and no statistics. A width is 1 + drafted
tokens.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Final

import torch

from paceline.bench.measured_rows import (
    random_text,
    read_sources,
    row_of,
    shortened,
    split_context,
)
from paceline.config import MAX_DRAFT_TOKENS
from paceline.contracts import NONE, Drafts, Request, Seconds
from paceline.costs.table import ENGINE, FORWARD, PREFILL, PROPOSE, ROUND, START, TARGET
from paceline.drafting.base import Drafter, pad_drafts
from paceline.drafting.contract import Draft, blaming, prepare_all
from paceline.engine import Driver, Engine
from paceline.engine.openmp import release_pool
from paceline.engine.rows import Row
from paceline.engine.step import run_round, verify
from paceline.errors import DrafterError
from paceline.models.detokenizer import Detokenizer
from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from paceline.assembly import Parts
    from paceline.contracts import RowView
    from paceline.engine.loop import Choose
    from paceline.models.language_model import LanguageModel
    from paceline.models.sublayers import LayerSubset

    Cell = tuple[str, str, int, int, int]  # subject, operation, tokens, context, rows
    Times = list[tuple[Cell, float]]  # seconds of each cell
    Workload = Callable[[int, random.Random], Times]  # of a repeat's number and a random order

SLOWDOWN: Final = "slowdown"  # of verification after a drafter's proposal: a ratio, not seconds
SKIPPING: Final = "skipping"  # the subject of forwards that leave sub-layers out
_PERIOD: Final = 7
_ENGINE_TOKENS: Final = 32
_TIMED_ROUNDS: Final = 2  # of one row, for each cell of a workload
ROUNDS_PER_LENGTH: Final = 1 + _TIMED_ROUNDS
_NO_TEXT: Final = Detokenizer.wrap(lambda tokens: "")


# --- the target -----------------------------------------------------------------------------------


def time_forwards(
    parts: Parts,
    rows: Sequence[Row],
    context: int,
    shapes: Sequence[Sequence[int]],
    repeat: int,
    order: random.Random,
) -> Times:
    """Time verification in whole rounds: forward, unembedding and judging of all rows' tokens.

    shapes: for each cell the tokens that each of the first rows drafts. Drafts are random ids.
    """
    drafter = _RandomDrafts(parts, order)
    times: Times = []
    for shape in order.sample(shapes, len(shapes)):
        cell = (TARGET, FORWARD, 1 + sum(shape), context, len(shape))
        with shortened(parts, rows[: len(shape)], context) as few:
            _use(drafter, few, shape)
            for timed in _repeated(len(shape)):
                _, spent = _run_round(parts, few)
                if timed:
                    times.append((cell, spent))
    return times


class _RandomDrafts(Drafter):
    """Random drafts as long as the limit, for rounds whose verification is timed."""

    kind = "random"

    def __init__(self, parts: Parts, order: random.Random) -> None:
        super().__init__("random", MAX_DRAFT_TOKENS)
        self._parts, self._order = parts, order

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        drafts = [random_text(self._parts, limit, self._order) for limit in limits]
        return Drafts(*pad_drafts(drafts, torch.device("cpu")))


def _use(drafter: Drafter, rows: Sequence[Row], lengths: Sequence[int]) -> None:
    """Let each row draft up to its length with a drafter in its next round."""
    for row, length in zip(rows, lengths, strict=True):
        row.drafter, row.arm = drafter, drafter.name if length else NONE
        row.max_total = len(row.tokens) + 1 + length


def _repeated(num_rows: int) -> Iterator[bool]:
    """Yield for each round of a cell whether it is timed; the first is not."""
    yield False
    for _ in range(_TIMED_ROUNDS if num_rows == 1 else 1):
        yield True


def _run_round(parts: Parts, rows: Sequence[Row]) -> tuple[float, float]:
    """Run a round of the engine and remove its tokens; return the seconds of drafting and verifying.

    Raises DrafterError if a drafter fails.
    """
    before = [(len(row.tokens), row.num_cached) for row in rows]
    for row in rows:
        row.seconds = Seconds()
    run_round(rows, parts.target, _NO_TEXT)
    error = next((row.error for row in rows if row.error is not None), None)
    if error is not None:
        raise DrafterError(error)
    for row, (num_tokens, num_cached) in zip(rows, before, strict=True):
        del row.tokens[num_tokens:]
        row.num_cached, row.finish_reason = num_cached, None
    return sum(row.seconds.draft for row in rows), sum(row.seconds.verify for row in rows)


def time_skipping(
    parts: Parts,
    row: Row,
    context: int,
    subsets: Mapping[str, LayerSubset],
    repeat: int,
    order: random.Random,
) -> Times:
    """Time forwards of one token that leave sub-layers out, with unembedding and copy to the host.

    subsets: operation -> the sub-layers to leave out.
    """
    times: Times = []
    with shortened(parts, [row], context) as [few]:
        token = torch.tensor(few.tokens[-1:])
        span = [Span(few.slot, few.num_cached, 1)]
        for operation in order.sample(list(subsets), len(subsets)):
            began = perf_counter()
            hidden = parts.target.forward(token, span, skip=subsets[operation])
            parts.target.unembed(hidden).argmax(dim=-1).tolist()
            times.append(((SKIPPING, operation, 1, context, 1), perf_counter() - began))
    return times


def time_prefill(
    parts: Parts, driver: Driver, num_prompt: int, repeat: int, order: random.Random
) -> Times:
    """Time a request of one token: the target's prefill, and the host's work once per request."""
    request = Request("", tuple(random_text(parts, num_prompt, order)), 1, drafter=NONE)
    release_pool()  # of this thread, whose workers would disturb the driver's
    began = perf_counter()
    list(driver.generate([request]))
    return [((TARGET, PREFILL, num_prompt, 0, 1), perf_counter() - began)]


def time_rounds(
    parts: Parts, driver: Driver, arm: str, num_rows: int, repeat: int, order: random.Random
) -> Times:
    """Time the host's part of a round: all seconds but those of prefill, choice, draft and forward."""
    num_prompt = min(16, parts.target.context_length)
    requests = [
        Request("", tuple(random_text(parts, num_prompt, order)), _ENGINE_TOKENS, drafter=arm)
        for _ in range(num_rows)
    ]
    release_pool()
    with parts.drafters[arm].at_full_length():
        done = list(driver.generate(requests))
    work = sum(c.seconds.total - c.seconds.commit for c in done)
    host = max(0.0, max(c.seconds_total for c in done) - work)
    return [((ENGINE, ROUND, 0, 0, num_rows), host / max(1, *(len(c.rounds) for c in done)))]


# --- drafters -------------------------------------------------------------------------------------


def time_drafts(
    parts: Parts,
    arm: str,
    lengths: Sequence[int],
    row_counts: Sequence[int],
    cached: Sequence[Row],
    context: int,
    repeat: int,
    order: random.Random,
) -> Times:
    """Time a drafter's start, then its part of rounds of every length for each number of rows.

    The cells SLOWDOWN compare verification in these rounds with that of random drafts. row_counts:
    ascending; the start is a cell only of one row alone. Texts grow by a token per round. cached: rows
    of the target, whose slots the drafter's rows take; the text there is another, which costs the same.
    """
    rounds = max(len(list(_repeated(num))) for num in row_counts)
    longest = context + 3 + len(lengths) * len(row_counts) * rounds
    period = None if repeat % 2 else _PERIOD
    texts = [random_text(parts, longest, order, period) for _ in range(row_counts[-1])]
    times: Times = []
    with _started(parts, parts.drafters[arm], texts, context, cached) as (rows, seconds):
        if len(rows) == 1:
            times.append(((arm, START, context, 0, 1), seconds))
        for num in row_counts:
            for length in order.sample(lengths, len(lengths)):
                for timed in _repeated(num):
                    drafted, drafting, verifying = _draft(parts, arm, rows[:num], length)
                    if timed:
                        times.append(((arm, PROPOSE, drafted, context, num), drafting))
                    _append_tokens(rows, texts)
                # in the same moment, so that other work on the machine slows both alike
                alone = _verify_alone(parts, rows[:num], drafted, order)
                times.append(((arm, SLOWDOWN, drafted, context, num), verifying / alone))
    return times


@contextmanager
def _started(
    parts: Parts,
    drafter: Drafter,
    texts: Sequence[list[int]],
    context: int,
    cached: Sequence[Row],
) -> Iterator[tuple[list[Row], float]]:
    """Start a drafter on the beginnings of texts; give its rows and the seconds of its prefill."""
    rows = [row_of(drafter, text[: context + 1], -1 - i) for i, text in enumerate(texts)]
    try:
        for row, other in zip(rows, cached, strict=False):
            row.slot = other.slot
        for row in rows:
            split_context(parts, row, context)
        read_sources(parts, rows, cached)
        _evict_weights(parts, cached[0])
        began = perf_counter()
        for row in rows:
            with blaming(row.drafter_name):
                drafter.start([row])
                prepare_all(drafter, row, parts.config.engine.prefill_chunk)
        _synchronize(parts)
        yield rows, perf_counter() - began
    finally:
        drafter.finish(rows)


def _draft(parts: Parts, arm: str, rows: Sequence[Row], length: int) -> tuple[int, float, float]:
    """Run a round in which rows draft up to `length` tokens with their drafter.

    Returns the tokens that each row drafted, and the seconds of drafting and verifying.
    """
    for row in rows:
        row.drafter, row.arm, row.rounds = parts.drafters[arm], arm, []
        row.max_total = len(row.tokens) + 1 + length
    with parts.drafters[arm].at_full_length():
        drafting, verifying = _run_round(parts, rows)
    return round(sum(row.rounds[0].drafted for row in rows) / len(rows)), drafting, verifying


def _verify_alone(parts: Parts, rows: Sequence[Row], length: int, order: random.Random) -> float:
    """Return the seconds of verification of random drafts, where no drafter ran just before."""
    _use(_RandomDrafts(parts, order), rows, [length] * len(rows))
    _run_round(parts, rows)
    return _run_round(parts, rows)[1]


def _evict_weights(parts: Parts, cached: Row) -> None:
    """Run a forward of the target, which evicts a drafter's weights, as before its prefill."""
    verify([cached], [Draft([])], parts.target)
    _synchronize(parts)


def _append_tokens(rows: Sequence[Row], texts: Sequence[Sequence[int]]) -> None:
    for row, text in zip(rows, texts, strict=True):
        row.tokens.append(text[len(row.tokens)])
        row.num_cached += 1


# --- engine, rows and texts -------------------------------------------------------------------------


def plain_driver(
    parts: Parts,
    max_rows: int,
    drafters: Mapping[str, Drafter] | None = None,
    model: LanguageModel | None = None,
    choose: Choose | None = None,
) -> Driver:
    """Return a driver of an engine that detokenizes nothing, by default with the parts' drafters.

    model: in the target's place.
    """
    return Driver(
        Engine(
            parts.target if model is None else model,
            parts.drafters if drafters is None else drafters,
            lambda tokens: "",
            choose=choose,
            max_rows=max_rows,
            prefill_chunk=parts.config.engine.prefill_chunk,
        )
    )


def _synchronize(parts: Parts) -> None:
    if parts.target.device.type != "cpu":
        torch.accelerator.synchronize()
