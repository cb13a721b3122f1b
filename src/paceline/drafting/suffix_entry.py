"""One row's draft of a suffix lookup as a single call of machine code, on addresses.

It reads the row's new tokens, then takes of the row's own text, the shared texts and the collected
answers the draft with the most expected tokens, of equals the first. Symbols: K num_draft_tokens, C
classes of evidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.compiled import carray, compiled, entry, float64_at, int32_at, int64_at, uncached
from paceline.drafting import answer_kernels, evidence, suffix_kernels
from paceline.drafting.answer_kernels import match_and_grow
from paceline.drafting.evidence import NUM_CLASSES, NUM_EVIDENCE, assumed_chances
from paceline.drafting.suffix_kernels import (
    MAX_MATCH,
    NUM_TOKENS,
    expected_tokens,
    extend_and_match,
    grow,
    match,
)
from paceline.store import contexts
from paceline.store.contexts import MAX_CONTEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.drafting.answers import Answers
    from paceline.drafting.shared_text import SharedText

# an index  [8] int64: addresses of its arrays and their lengths, see `SuffixIndex`
HEADER, STATES, NUM_STATES, EDGES, NUM_EDGES, TABLE, TABLE_SIZE, TEXT, INDEX_SIZE = range(9)

# the sources of a drafter besides a row's own text  [9] int64: addresses and lengths
(
    SHARED,  # addresses of the indices of shared texts
    NUM_SHARED,
    TOKENS,  # of the collected answers; 0 without any
    NUM_ANSWERED,
    ORDER,
    LEFT_OUT,
    NUM_LEFT_OUT,
    CHANCES,
    NUMBERS,
    SOURCES_SIZE,
) = range(10)

# its settings  [6] float64, at NUMBERS
NUM_DRAFT_TOKENS, MIN_MATCH, LENGTH_FACTOR, LENGTH_OFFSET, PATHS, MIN_PROBABILITY = range(6)
NUM_NUMBERS: Final = 6

LEAVES: Final = 1 << 16
"""The result of `draft_row` is LEAVES * leaves + nodes."""


@compiled
def _automaton_at(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    at = carray(int64_at(index), INDEX_SIZE)
    return (
        carray(int64_at(at[HEADER]), 7),
        carray(int32_at(at[STATES]), (at[NUM_STATES], 5)),
        carray(int32_at(at[EDGES]), (at[NUM_EDGES], 6)),
        carray(int32_at(at[TABLE]), at[TABLE_SIZE]),
    )


@compiled
def _longest(numbers: np.ndarray, length: int, most: int) -> int:
    """Return the maximum number of tokens to draft after a match."""
    longest = numbers[LENGTH_FACTOR] * length + numbers[LENGTH_OFFSET]
    return int(max(0.0, min(float(most), longest)))


@uncached
def _grow_from(
    index: int,
    state: int,
    length: int,
    numbers: np.ndarray,
    limit: int,
    best: float,
    chances: np.ndarray,
    first_class: int,
    out: np.ndarray,
) -> tuple[int, int, float]:
    """Write an index's draft into out [3, K]; return its nodes, leaves and expected tokens.

    Zeros if it cannot beat `best`. first_class: of the evidence of its source.
    """
    longest = _longest(numbers, length, out.shape[1])
    if longest <= best:
        return 0, 0, 0.0  # it cannot expect more
    nodes, leaves, _ = grow(
        _automaton_at(index), state, length, int(numbers[MIN_MATCH]), limit, int(numbers[PATHS]),
        numbers[MIN_PROBABILITY], out[0, :longest], out[1, :longest], out[2, :longest],
    )  # fmt: skip
    for node in range(nodes):
        out[2, node] += first_class
    return nodes, leaves, expected_tokens(out[1], out[2], nodes, chances)


@compiled
def _copy_draft(source: np.ndarray, target: np.ndarray, nodes: int) -> None:
    for field in range(3):
        for node in range(nodes):
            target[field, node] = source[field, node]


def _make_draft_row(version: int) -> Callable[..., int]:
    def draft_row(
        index: int, sources: int, num_tokens: int, limit: int, out: int, room: int
    ) -> int:
        at = carray(int64_at(sources), SOURCES_SIZE)
        own = carray(int64_at(index), INDEX_SIZE)
        numbers = carray(float64_at(at[NUMBERS]), NUM_NUMBERS)
        chances = carray(float64_at(at[CHANCES]), NUM_CLASSES)
        text = carray(int32_at(own[TEXT]), num_tokens)
        automaton = _automaton_at(index)
        header = automaton[0]
        state, length, _ = extend_and_match(automaton, text, header[NUM_TOKENS], num_tokens)
        if limit < 1 or version == 0:
            return 0
        K = min(int(numbers[NUM_DRAFT_TOKENS]), room)
        tree = carray(int64_at(out), (3, room))[:, :K]
        nodes, leaves, best = _grow_from(
            index, state, length, numbers, limit, 0.0, chances, 0, tree
        )
        other = np.empty((3, 1, K), dtype=np.int64)
        suffix = text[max(0, num_tokens - header[MAX_MATCH]) :]
        for k in range(at[NUM_SHARED]):
            shared = carray(int64_at(at[SHARED]), at[NUM_SHARED])[k]
            state, length = match(_automaton_at(shared), suffix)
            found, ends, expected = _grow_from(
                shared, state, length, numbers, limit, best, chances, NUM_EVIDENCE, other[:, 0]
            )
            if expected > best:
                nodes, leaves, best = found, ends, expected
                _copy_draft(other[:, 0], tree, nodes)
        if at[TOKENS] != 0:
            found, ends, _ = match_and_grow(
                carray(int32_at(at[TOKENS]), at[NUM_ANSWERED]),
                carray(int32_at(at[ORDER]), at[NUM_ANSWERED]),
                carray(int64_at(at[LEFT_OUT]), at[NUM_LEFT_OUT]),
                text[max(0, num_tokens - min(header[MAX_MATCH], MAX_CONTEXT)) :],
                int(numbers[MIN_MATCH]), numbers[LENGTH_FACTOR], numbers[LENGTH_OFFSET],
                limit, int(numbers[PATHS]), numbers[MIN_PROBABILITY], best, other, 0,
            )  # fmt: skip
            expected = expected_tokens(other[1, 0], other[2, 0], found, chances)
            if expected > best:
                nodes, leaves = found, ends
                _copy_draft(other[:, 0], tree, nodes)
        return LEAVES * leaves + nodes

    return draft_row


draft_row: Callable[..., int] = entry(
    _make_draft_row, 6, (suffix_kernels, answer_kernels, evidence, contexts)
)
"""draft_row(index, sources, num_tokens, limit, out, room): reads the row up to `num_tokens` and drafts.

index, sources: addresses of the tables. limit: maximum depth. out: address of [3, room] int64, receives
at most `room` tokens, their parents and evidence. Returns LEAVES * leaves + nodes.
"""


def new_drafts(num_rows: int, num_draft_tokens: int) -> np.ndarray:
    """Return room for the drafts of rows, [R, 3, K] int64."""
    return np.full((num_rows, 3, num_draft_tokens), -1, dtype=np.int64)


class SourceTable:
    """The sources and settings of a drafter where `draft_row` finds them."""

    def __init__(
        self,
        num_draft_tokens: int,
        others: Sequence[float],
        shared: SharedText | None,
        answers: Answers | None,
    ) -> None:
        """others: the settings after NUM_DRAFT_TOKENS, in order."""
        self._shared, self._answers = shared, answers
        self._made_of = self._versions(num_draft_tokens)
        parts = [] if shared is None else shared.parts
        index = None if answers is None else answers.index
        nothing = np.empty(0, dtype=np.int32)
        self._kept = (  # alive as long as their addresses
            np.array([part.address for part in parts], dtype=np.int64),
            parts,
            nothing if index is None else index.tokens,
            nothing if index is None else index.order,
            nothing if answers is None else answers.left_out,
            assumed_chances(),
            np.array([num_draft_tokens, *others], dtype=np.float64),
        )
        of_parts, _, tokens, order, left_out, chances, numbers = self._kept
        fields = np.zeros(SOURCES_SIZE, dtype=np.int64)
        fields[[SHARED, NUM_SHARED]] = of_parts.ctypes.data, len(parts)
        if index is not None:
            fields[[TOKENS, NUM_ANSWERED]] = tokens.ctypes.data, len(tokens)
            fields[[ORDER, LEFT_OUT]] = order.ctypes.data, left_out.ctypes.data
            fields[NUM_LEFT_OUT] = len(left_out)
        fields[[CHANCES, NUMBERS]] = chances.ctypes.data, numbers.ctypes.data
        self._fields = fields
        self.address: int = fields.ctypes.data

    def is_stale(self, num_draft_tokens: int) -> bool:
        """Return whether this number, the shared texts or the answers differ from the table's."""
        return self._versions(num_draft_tokens) != self._made_of

    def _versions(self, num_draft_tokens: int) -> tuple[int, int, int]:
        return (
            num_draft_tokens,
            -1 if self._shared is None else self._shared.version,
            -1 if self._answers is None else self._answers.version,
        )
