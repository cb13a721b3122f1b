"""Earlier occurrences of a text's own suffix and the tokens after them, updated token by token.

`SuffixIndex` owns the arrays that the kernels grow; `RowIndices` keeps an index per row and reads the
row's new tokens when it is asked. This module knows no models.
"""

from __future__ import annotations

from functools import cache
from itertools import chain
from struct import pack_into
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from paceline.contracts import RowView

_MIN_CAPACITY: Final = 128  # tokens


class Match(NamedTuple):
    """The longest suffix of a text that occurs in an index; `length` 0 means no match.

    source: of the text's own suffix, the index of the token after its latest earlier occurrence.
    """

    state: int
    length: int
    source: int = -1


class SuffixIndex:
    """A suffix automaton of one text. Contexts of up to `max_match` tokens are counted.

    num_tokens: tokens of the text so far. address: of the table of its arrays, which moves when the
    index grows. capacity: number of tokens to reserve room for.
    """

    def __init__(self, max_match: int, capacity: int = 0) -> None:
        # imported here because numba takes a second to import
        from paceline.drafting import suffix_kernels

        self._kernels = suffix_kernels
        self._header = np.zeros(7, dtype=np.int64)
        self._header[suffix_kernels.MAX_MATCH] = max_match
        self.num_tokens = 0
        self._allocate(max(capacity, _MIN_CAPACITY))
        self._kernels.clear(self._automaton)

    def _allocate(self, capacity: int) -> None:
        text = np.empty(capacity, dtype=np.int32)
        states = np.empty((2 * capacity + 2, 5), dtype=np.int32)
        edges = np.empty((3 * capacity + 2, 6), dtype=np.int32)
        # a power of two, 4/3 to 8/3 of the maximum number of edges
        table = np.full(1 << (4 * capacity - 1).bit_length(), -1, dtype=np.int32)
        # all or none: without memory for one of them, the addresses must not outlive their arrays
        self._capacity = capacity
        self._text, self._states, self._edges, self._table = text, states, edges, table
        self._automaton = (self._header, self._states, self._edges, self._table)
        # in the order of the index table in `suffix_entry`
        sized = ((array.ctypes.data, len(array)) for array in self._automaton[1:])
        numbers = (self._header.ctypes.data, *chain(*sized), self._text.ctypes.data)
        self._addresses = np.array(numbers, dtype=np.int64)
        self.address: int = self._addresses.ctypes.data

    def _make_room(self, num_tokens: int) -> None:
        kernels, text, states, edges = self._kernels, self._text, self._states, self._edges
        self._allocate(num_tokens * 3 // 2)
        self._text[: self.num_tokens] = text[: self.num_tokens]
        num_states, num_edges = self._header[[kernels.NUM_STATES, kernels.NUM_EDGES]].tolist()
        self._states[:num_states] = states[:num_states]
        self._edges[:num_edges] = edges[:num_edges]
        kernels.rehash(self._edges, num_edges, self._table)

    def extend(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens [n] to the text."""
        first = self.num_tokens
        self.write(tokens)
        self._kernels.extend(self._automaton, self._text[first : self.num_tokens])

    def write(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Write tokens [n] after the text without indexing them, which compiled code does later."""
        num_tokens = self.num_tokens + len(tokens)
        if num_tokens > self._capacity:
            self._make_room(num_tokens)
        # much faster than numpy with a few numbers
        pack_into(f"{len(tokens)}i", self._text.data, 4 * self.num_tokens, *tokens)
        self.num_tokens = num_tokens

    def match_own(self) -> Match:
        """Return the longest suffix of the text that occurs earlier, with its latest occurrence."""
        num_read = int(self._header[self._kernels.NUM_TOKENS])
        found = self._kernels.extend_and_match(
            self._automaton, self._text, num_read, self.num_tokens
        )
        return Match(*found)

    def num_bytes(self) -> int:
        """Return the bytes of the arrays, with their unused room."""
        return self._text.nbytes + sum(array.nbytes for array in self._automaton)


class RowIndices:
    """An index of each row's text, by row id."""

    def __init__(self, max_match: int) -> None:
        self._max_match = max_match
        self._by_row: dict[int, SuffixIndex] = {}
        compile_kernels()

    def start(self, rows: Iterable[RowView]) -> None:
        """Forget earlier rows of these ids; the text is read when it is needed."""
        self.finish(rows)

    def finish(self, rows: Iterable[RowView]) -> None:
        for row in rows:
            self._by_row.pop(row.id, None)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        """Read up to `max_tokens` more tokens of a row; return True when none is left."""
        index = self.index(row)
        index.extend(row.tokens[index.num_tokens : index.num_tokens + max_tokens])
        return index.num_tokens == len(row.tokens)

    def write_new(self, row: RowView) -> SuffixIndex:
        """Write a row's new tokens after its index's text, and return the index."""
        # asked for in every round, so with few calls
        index = self._by_row.get(row.id) or self.index(row)
        index.write(row.tokens[index.num_tokens :])
        return index

    def match_own(self, row: RowView) -> Match:
        """Return the `SuffixIndex.match_own` of a row, after reading its new tokens."""
        return self.write_new(row).match_own()

    def num_bytes(self) -> int:
        return sum(index.num_bytes() for index in self._by_row.values())

    def index(self, row: RowView) -> SuffixIndex:
        """Return a row's index, which may be empty."""
        index = self._by_row.get(row.id)
        if index is None:
            index = SuffixIndex(self._max_match, len(row.tokens) * 3 // 2)
            self._by_row[row.id] = index
        return index


@cache
def compile_kernels() -> None:
    """Compile the kernels that Python calls, so that the first request does not wait."""
    index = SuffixIndex(2)
    index.extend(range(_MIN_CAPACITY + 1))
    index.match_own()
