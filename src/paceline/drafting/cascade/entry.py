"""A cascade's decision for one row as a single call of machine code, on addresses.

`choose_row` learns from the last draft, chooses, and writes a lookup's draft; `cut_row` ends a model's
chain. Symbols: L lookups, M models, P = L + M parts, W the longest chain of a model, K the longest
draft, C buckets of contexts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.compiled import carray, compiled, entry, float64_at, int32_at, int64_at, uncached
from paceline.drafting import evidence, suffix_entry
from paceline.drafting.cascade import classes, fields, kernels, prices
from paceline.drafting.cascade.classes import NUM_BINS, NUM_SURE
from paceline.drafting.cascade.fields import (
    BIN,
    BRANCHES,
    DRAFTED,
    DRAFTED_AT,
    LENGTH,
    NUM_FIELDS,
    PART,
)
from paceline.drafting.cascade.kernels import choose, cut_chain, learn
from paceline.drafting.cascade.prices import BUCKET
from paceline.drafting.evidence import NUM_CLASSES
from paceline.drafting.suffix_entry import INDEX_SIZE, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.drafting.cascade.calibration import Chances
    from paceline.drafting.cascade.prices import Prices

# a cascade  [12] int64: sizes, then addresses of chances and prices
(
    LOOKUPS,
    MODELS,
    LONGEST_CHAIN,
    WIDTH,
    CONTEXTS,
    STOPS_EARLY,
    TABLES,
    PROSPECTS,
    IF_SURE,
    VERIFYING,
    DRAFTING,
    READING,
    TABLE_SIZE,
) = range(13)

LEAST: Final = 0  # place of `RowState.least` in a row's float64 numbers


def whole_numbers(L: int, M: int, K: int) -> dict[str, int]:
    """Return the sizes of the sections of a row's int64 numbers, in order; see `RowState`."""
    return {"fields": NUM_FIELDS, "lengths": L, "read": M, "rooms": M, "nodes": 2 * K}


def other_numbers(L: int, M: int, K: int, W: int) -> dict[str, int]:
    """Return the sizes of the sections of a row's float64 numbers, in order; see `RowState`."""
    P = L + M
    return {
        "least": 1, "seen": 2 * P, "base": K, "chances": P * K, "priced": M * (W + 1), "sure": W,
    }  # fmt: skip


class RowState:
    """Counts of a row's parts and its last draft, laid out for machine code.

    seen: [P, 2]. read: [M] tokens that each model has read. lengths: [L] of the lookups' drafts of this
    round, which are written to `drafts` [L, 3, K] at `drafts_at`, `draft_bytes` apart. rooms: [M] tokens
    that each model can draft. nodes: [2, K] the draft's tokens and parents; chances: [P, K]; priced:
    [M, W + 1] seconds of a model's draft; sure: [W] the probabilities of a model's chain.
    """

    def __init__(self, L: int, M: int, K: int, W: int, num_read: int) -> None:
        whole, other = whole_numbers(L, M, K), other_numbers(L, M, K, W)
        self._whole = np.zeros(sum(whole.values()), dtype=np.int64)
        self._other = np.zeros(sum(other.values()))
        self.fields, self.lengths, self.read, self.rooms, nodes = _split(self._whole, whole)
        _, seen, self.base, chances, priced, self.sure = _split(self._other, other)
        self.seen, self.nodes = seen.reshape(-1, 2), nodes.reshape(2, K)
        self.chances, self.priced = chances.reshape(-1, K), priced.reshape(M, W + 1)
        self.fields[PART] = -1
        self.read[:] = num_read
        self.drafts = np.full((L, 3, K), -1, dtype=np.int64)
        self.drafts_at: int = self.drafts.ctypes.data
        self.draft_bytes: int = self.drafts.strides[0]
        self.whole_at: int = self._whole.ctypes.data
        self.other_at: int = self._other.ctypes.data
        self.num_prepared = 0  # parts whose prefill is complete

    @property
    def least(self) -> float:
        """The chance of a chain's tokens below which a further one does not pay."""
        return float(self._other[LEAST])


def _split(numbers: np.ndarray, sizes: dict[str, int]) -> list[np.ndarray]:
    return np.split(numbers, np.cumsum(list(sizes.values()))[:-1])


class CascadeTable:
    """A cascade's sizes, chances and prices where machine code finds them."""

    def __init__(
        self, sizes: tuple[int, int, int, int], chances: Chances, prices: Prices, stops_early: bool
    ) -> None:
        """sizes: L, M, W, K. Machine code checks no bounds, so the arrays must fit them."""
        L, M, W, _ = sizes
        assert chances.tables.shape == (L, NUM_CLASSES)
        assert chances.prospects.shape == (M, NUM_BINS, 2)
        assert chances.if_sure.shape == (M, NUM_SURE)
        assert prices.verifying.shape[1:] == (W + 1,)
        assert prices.reading.shape == (M,)
        assert prices.drafting.shape == (len(prices.verifying), M, W + 1)
        self._kept = [
            np.ascontiguousarray(array, dtype=np.float64)
            for array in (
                chances.tables, chances.prospects, chances.if_sure,
                prices.verifying, prices.drafting, prices.reading,
            )
        ]  # fmt: skip
        numbers = (*sizes, len(prices.verifying), stops_early)
        self._fields = np.array([*numbers, *(a.ctypes.data for a in self._kept)], dtype=np.int64)
        self.address: int = self._fields.ctypes.data


# --- machine code ---------------------------------------------------------------------------------


@compiled
def _places(P: int, M: int, K: int, W: int) -> tuple[int, int, int, int]:
    """Return where base, chances, priced and sure begin, in the order of `other_numbers`."""
    base = 1 + 2 * P
    chances = base + K
    priced = chances + P * K
    return base, chances, priced, priced + M * (W + 1)


@compiled
def _table_in(numbers: np.ndarray, begin: int, rows: int, columns: int) -> np.ndarray:
    return numbers[begin : begin + rows * columns].reshape(rows, columns)


@uncached
def _bucket_of(num_tokens: int, num_buckets: int) -> int:
    """Return the bucket of contexts whose prices a row of this many tokens has."""
    return min((num_tokens - 1) // BUCKET, num_buckets - 1)


@compiled
def _copy_draft(source: np.ndarray, nodes: np.ndarray, length: int) -> None:
    for node in range(length):
        nodes[0, node], nodes[1, node] = source[0, node], source[1, node]


def _make_choose_row(version: int) -> Callable[..., int]:
    def choose_row(
        table: int, whole: int, other: int, drafts: int, index: int, num_tokens: int, limit: int
    ) -> int:
        t = carray(int64_at(table), TABLE_SIZE)
        L, M, W, K = t[LOOKUPS], t[MODELS], t[LONGEST_CHAIN], t[WIDTH]
        P = L + M
        own = carray(int64_at(whole), NUM_FIELDS + L + 2 * M + 2 * K)
        lengths = own[NUM_FIELDS : NUM_FIELDS + L]
        read = own[NUM_FIELDS + L : NUM_FIELDS + L + M]
        rooms = own[NUM_FIELDS + L + M : NUM_FIELDS + L + 2 * M]
        nodes = _table_in(own, NUM_FIELDS + L + 2 * M, 2, K)
        of_base, of_chances, of_priced, of_sure = _places(P, M, K, W)
        numbers = carray(float64_at(other), of_sure)
        seen, base = _table_in(numbers, 1, P, 2), numbers[of_base:of_chances]
        chances = _table_in(numbers, of_chances, P, K)
        priced = _table_in(numbers, of_priced, M, W + 1)
        tables = carray(float64_at(t[TABLES]), (L, NUM_CLASSES))
        prospects = carray(float64_at(t[PROSPECTS]), (M, NUM_BINS, 2))
        if own[PART] >= 0:
            text = carray(int32_at(carray(int64_at(index), INDEX_SIZE)[TEXT]), num_tokens)
            size, begin = own[DRAFTED], own[DRAFTED_AT]
            written = text[begin : min(num_tokens, begin + size + 1)]
            learn(nodes[0], nodes[1], base, size, written, seen[own[PART]])
        at = _bucket_of(num_tokens, t[CONTEXTS])
        verifying = carray(float64_at(t[VERIFYING]), (t[CONTEXTS], W + 1))[at]
        drafting = carray(float64_at(t[DRAFTING]), (t[CONTEXTS], M, W + 1))[at]
        reading = carray(float64_at(t[READING]), M)
        for model in range(M):
            unread = reading[model] * (num_tokens - 1 - read[model])
            for k in range(W + 1):
                priced[model, k] = drafting[model, k] + unread
        found = carray(int64_at(drafts), (L, 3, K))
        part, length, sure, branches, least = choose(
            found[:, 2], found[:, 1], lengths, limit, tables, prospects, seen, verifying, priced,
            rooms, chances,
        )  # fmt: skip
        if t[STOPS_EARLY] == 0 and M > 0:
            part, least, branches = L, 0.0, False
            length = max(0, min(limit, W, rooms[0]))
        if length == 0 or version == 0:
            part = -1
        elif part < L:
            _copy_draft(found[part], nodes, length)
            for node in range(length):
                base[node] = tables[part, found[part, 2, node]]
        else:
            read[part - L] = num_tokens - 1
            for k in range(K):
                nodes[1, k], base[k] = k - 1, prospects[part - L, sure, min(k, 1)]
        numbers[LEAST] = least
        own[PART], own[LENGTH], own[BRANCHES] = part, length, branches
        own[BIN], own[DRAFTED_AT], own[DRAFTED] = sure, num_tokens, length
        return part

    return choose_row


def _make_cut_row(version: int) -> Callable[..., int]:
    def cut_row(table: int, whole: int, other: int, num_tokens: int, drafted: int) -> int:
        t = carray(int64_at(table), TABLE_SIZE)
        L, M, W, K = t[LOOKUPS], t[MODELS], t[LONGEST_CHAIN], t[WIDTH]
        P = L + M
        own = carray(int64_at(whole), NUM_FIELDS)
        _, of_chances, of_priced, of_sure = _places(P, M, K, W)
        numbers = carray(float64_at(other), of_sure + W)
        model = own[PART] - L
        chances = _table_in(numbers, of_chances, P, K)[own[PART]]
        priced = _table_in(numbers, of_priced, M, W + 1)[model]
        sure = numbers[of_sure : of_sure + drafted]
        at = _bucket_of(num_tokens, t[CONTEXTS])
        verifying = carray(float64_at(t[VERIFYING]), (t[CONTEXTS], W + 1))[at]
        if_sure = carray(float64_at(t[IF_SURE]), (M, NUM_SURE))[model]
        length = cut_chain(sure, if_sure, verifying, priced[drafted], chances)
        if length == 0 or version == 0:
            own[PART] = -1
        own[LENGTH] = own[DRAFTED] = length
        return length

    return cut_row


_CALLS: Final = (kernels, classes, fields, prices, evidence, suffix_entry)
choose_row: Callable[..., int] = entry(_make_choose_row, 7, _CALLS)
"""choose_row(table, whole, other, drafts, index, num_tokens, limit): chooses a row's part, -1 for none.

Addresses of a `CascadeTable`, of a `RowState`'s numbers and drafts, and of the index of its text. A
lookup's draft is in the state's nodes afterwards. limit: maximum depth.
"""
cut_row: Callable[..., int] = entry(_make_cut_row, 5, _CALLS)
"""cut_row(table, whole, other, num_tokens, drafted): cuts a model's chain, returns what is left of it.

The state's `sure` has the probabilities of the chain's tokens.
"""
