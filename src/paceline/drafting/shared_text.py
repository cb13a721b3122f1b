"""The answers to earlier requests that suffix lookups of one tenant share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.drafting.suffix_index import SuffixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

_END: Final = -1  # after every answer; it is no token, so no match crosses it


class SharedText:
    """The answers to earlier requests as one bounded text; the oldest are dropped first.

    Two suffix indices alternate: one is being filled, the other is full or does not exist yet. When the
    first is full as well, the older one is dropped as a whole. So the answers kept are
    between half of the bound and all of it, and no request waits for an index to be rebuilt. parts: the
    indices to search; the first is the one being filled.
    """

    def __init__(self, max_match: int, max_tokens: int) -> None:
        self._max_match = max_match
        self._room = max_tokens // 2  # of one index
        self.parts = [self._empty()]
        self.version = 0  # changes with the parts

    def _empty(self) -> SuffixIndex:
        # allocated at full size, so that growing never copies
        return SuffixIndex(self._max_match, self._room)

    def add(self, tokens: Sequence[int]) -> None:
        """Keep an answer, or its end if it is longer than an index."""
        if not tokens:
            return
        answer = [*tokens[-(self._room - 1) :], _END]
        if self.parts[0].num_tokens + len(answer) > self._room:
            self.parts = [self._empty(), self.parts[0]]
            self.version += 1
        self.parts[0].extend(answer)

    def num_bytes(self) -> int:
        return sum(part.num_bytes() for part in self.parts)
