"""Earlier occurrences of a text's own suffix and the tokens after them, updated token by token.

`SuffixIndex` owns the arrays that the kernels grow; `RowIndices` keeps an index per row and reads the
row's new tokens when it is asked. This module knows no models.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from paceline.contracts import RowView

_MIN_CAPACITY: Final = 128  # tokens
_NO_TOKENS: Final = np.empty(0, dtype=np.int32)


class Match(NamedTuple):
    """The longest suffix of a text that occurs in an index; `length` 0 means no match.

    source: of the text's own suffix, the index of the token after its latest earlier occurrence.
    """

    state: int
    length: int
    source: int = -1


class Tree(NamedTuple):
    """The size of a draft that `SuffixIndex.grow` wrote."""

    num_tokens: int
    num_leaves: int
    expected: float  # number of accepted tokens, estimated from the counts


class SuffixIndex:
    """A suffix automaton of one text. Contexts of up to `max_match` tokens are counted.

    num_tokens: tokens indexed so far. capacity: number of tokens to reserve room for; the index grows if
    needed.
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
        self._capacity = capacity
        self._states = np.empty((2 * capacity + 2, 5), dtype=np.int32)
        self._edges = np.empty((3 * capacity + 2, 6), dtype=np.int32)
        # a power of two, 4/3 to 8/3 of the maximum number of edges
        self._table = np.full(1 << (4 * capacity - 1).bit_length(), -1, dtype=np.int32)
        self._automaton = (self._header, self._states, self._edges, self._table)

    def _make_room(self, num_tokens: int) -> None:
        if num_tokens <= self._capacity:
            return
        kernels, states, edges = self._kernels, self._states, self._edges
        self._allocate(num_tokens * 3 // 2)
        num_states, num_edges = self._header[[kernels.NUM_STATES, kernels.NUM_EDGES]].tolist()
        self._states[:num_states] = states[:num_states]
        self._edges[:num_edges] = edges[:num_edges]
        kernels.rehash(self._edges, num_edges, self._table)

    def extend(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens [n] to the text."""
        self._make_room(self.num_tokens + len(tokens))
        self._kernels.extend(self._automaton, np.array(tokens, dtype=np.int32))
        self.num_tokens += len(tokens)

    def match_own(self) -> Match:
        """Return the longest suffix of the text that occurs earlier, with its latest occurrence."""
        return self.extend_and_match(_NO_TOKENS, 0, 0)

    def extend_and_match(self, tokens: np.ndarray, first: int, last: int) -> Match:
        """Append tokens[first:last] int32 to the text; return as `match_own`."""
        num_tokens = self.num_tokens + last - first
        self._make_room(num_tokens)
        self.num_tokens = num_tokens
        return Match(*self._kernels.extend_and_match(self._automaton, tokens, first, last))

    def match(self, suffix: np.ndarray) -> Match:
        """Return the longest suffix of other tokens [n <= max_match] int32 that occurs in the text."""
        return Match(*self._kernels.match(self._automaton, suffix))

    def grow(
        self,
        match: Match,
        min_match: int,
        depth: int,
        paths: int,
        min_probability: float,
        tokens: np.ndarray,
        parents: np.ndarray,
        evidence: np.ndarray,
    ) -> Tree:
        """Write the likeliest continuations of a match into tokens, parents and evidence [K] int64.

        The evidence of a token is its class by `suffix_kernels.evidence_of`.

        A token's probability is the product, along its path, of its count after its context over the
        count of all tokens there. The best token is added first, until there are K tokens or none is
        left with at least `min_probability`, at most `depth` deep, on at most `paths` paths. A context
        that nothing followed, because the text ends there, is shortened from the left until something
        did; below `min_match` tokens the path ends.
        """
        return Tree(
            *self._kernels.grow(
                self._automaton, match.state, match.length,
                min_match, depth, paths, min_probability, tokens, parents, evidence,
            )
        )  # fmt: skip

    def num_bytes(self) -> int:
        """Return the bytes of the arrays, with their unused room."""
        return sum(array.nbytes for array in self._automaton)


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
        index = self._index(row)
        index.extend(row.tokens[index.num_tokens : index.num_tokens + max_tokens])
        return index.num_tokens == len(row.tokens)

    def match_own(self, rows: Sequence[RowView]) -> list[tuple[SuffixIndex, Match]]:
        """Return each row's index with its `match_own`, after reading the rows' new tokens."""
        indices = [self._index(row) for row in rows]
        new: list[int] = []
        ends: list[int] = []
        for row, index in zip(rows, indices, strict=True):
            new += row.tokens[index.num_tokens :]
            ends.append(len(new))
        # one array for all rows, since it costs as much as one call of machine code
        tokens = np.array(new, dtype=np.int32)
        found: list[tuple[SuffixIndex, Match]] = []
        first = 0
        for index, last in zip(indices, ends, strict=True):
            found.append((index, index.extend_and_match(tokens, first, last)))
            first = last
        return found

    def num_bytes(self) -> int:
        return sum(index.num_bytes() for index in self._by_row.values())

    def _index(self, row: RowView) -> SuffixIndex:
        index = self._by_row.get(row.id)
        if index is None:
            index = SuffixIndex(self._max_match, len(row.tokens) * 3 // 2)
            self._by_row[row.id] = index
        return index


@cache
def compile_kernels() -> None:
    """Run every kernel once, so that the first request does not wait for the compiler."""
    index = SuffixIndex(2)
    index.extend(range(_MIN_CAPACITY + 1))
    index.extend([0, 1])
    own: Any = index.match_own()
    for match in (own, index.match(np.array([0, 1], dtype=np.int32))):
        out = np.empty((3, 4), dtype=np.int64)
        index.grow(match, 1, 4, 2, 0.1, *out)
