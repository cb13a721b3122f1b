"""The slots of a cache's rows, and the bound on the positions that they hold together."""

from __future__ import annotations

import bisect


class Slots:
    """Slots that are taken and given back, the lowest free one first; base of the caches on the CPU.

    Rows of a model with an encoder have a second cache, of their sources, whose slots have the same
    numbers.
    """

    def __init__(self, of_sources: Slots | None = None) -> None:
        """of_sources: an empty cache for the rows' sources."""
        self._of_sources = of_sources
        self._free: list[int] = []
        self._lengths: list[int] = []  # positions that the row of each slot has needed so far
        self._limit: int | None = None
        self._exact_fit = False

    def bound(self, limit: int | None, exact_fit: bool = False) -> None:
        self._limit, self._exact_fit = limit, exact_fit
        if self._of_sources is not None:
            self._of_sources.bound(limit, exact_fit)

    @property
    def num_rows(self) -> int:
        return len(self._lengths) - len(self._free)

    @property
    def num_slots(self) -> int:
        """Slots up to the last one in use."""
        return len(self._lengths)

    @property
    def num_slots_with_one_more(self) -> int:
        return len(self._lengths) + (not self._free)

    def length(self, slot: int) -> int:
        """Return the positions that the row of a slot has needed so far."""
        return self._lengths[slot]

    def acquire(self) -> int:
        """Return the lowest free slot and take it, so that rows in flight stay neighbours."""
        if self._of_sources is not None:
            self._of_sources.acquire()  # of the same number
        if self._free:
            return self._free.pop(0)
        self._lengths.append(0)
        return len(self._lengths) - 1

    def release(self, slot: int) -> None:
        """Give a slot back; free slots after the last one in use are gone."""
        if self._of_sources is not None:
            self._of_sources.release(slot)
        bisect.insort(self._free, slot)
        self._lengths[slot] = 0
        while self._free and self._free[-1] == len(self._lengths) - 1:
            self._free.pop()
            self._lengths.pop()
