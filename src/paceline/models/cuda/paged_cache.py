"""Keys and values of all rows of one model in blocks of one pool, for devices that gather cheaply.

The twin of `cache.RowCache`: a row owns a list of blocks instead of a slice of every layer, so rows of
any lengths share memory. A layer's pool is [places, 2 * Hkv, D], keys before values, BLOCK places per
block; the same blocks serve every layer. No row owns block 0: padding is written there, and table
entries without a block point to it. The table is copied to the device only after a row got a block.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from paceline.models.cuda.batch import PagedBatch
from paceline.models.cuda.layout import BLOCK, Shape, lay_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.packing import Span

_FIRST_BLOCKS: Final = 64  # the pool's first size; it doubles from there


class PagedCache:
    """A `KVCache` of slots with blocks in a pool per layer.

    version: changes when a tensor moves, so that captured steps, which keep addresses, are dropped.
    """

    block: Final = BLOCK
    stores_all_first: Final = True
    sources: Final = None  # rows with a source have another cache

    def __init__(self, device: torch.device) -> None:
        self.layers: list[Tensor | None] = []
        self.version = 0
        self._device = device
        self._num_blocks = _FIRST_BLOCKS
        self._free_blocks = list(range(_FIRST_BLOCKS - 1, 0, -1))  # the next one last
        self._free_slots: list[int] = []
        self._blocks: list[list[int]] = []  # of each slot, in the order of their positions
        self._host = np.zeros((8, 16), dtype=np.int32)  # [slots, blocks per row]
        self._table: Tensor | None = None
        self._stale = True  # whether the device's table is out of date
        self._limit: int | None = None  # blocks, including the first one

    def bound(self, limit: int | None, exact_fit: bool = False) -> None:
        """Hold at most `limit` positions, in whole blocks, unless the rows need more.

        exact_fit: without effect, since a row owns only the blocks that it needs.
        """
        self._limit = None if limit is None else -(-limit // BLOCK) + 1
        if self._limit is not None and self._limit < self._num_blocks and not self.num_rows:
            self._num_blocks = self._limit
            self._free_blocks = list(range(self._limit - 1, 0, -1))
            self.layers = []
            self.version += 1

    @property
    def num_rows(self) -> int:
        return len(self._blocks) - len(self._free_slots)

    @property
    def num_slots(self) -> int:
        """Slots that need memory: those in use, since rows share the free blocks."""
        return self.num_rows

    @property
    def num_slots_with_one_more(self) -> int:
        return self.num_rows + 1

    @property
    def max_length(self) -> int | None:
        """Maximum number of positions per row within the bound, if all rows are equally long."""
        return None if self._limit is None else (self._limit - 1) * BLOCK // max(1, self.num_rows)

    def rounded(self, num_positions: int) -> int:
        """Return the positions that count against a bound: the unused rest of a last block does not."""
        return num_positions

    def forget(self, slot: int) -> None:
        """Free a row's blocks; their keys and values are lost."""
        self._free_blocks.extend(reversed(self._blocks[slot]))
        self._blocks[slot] = []
        self._host[slot] = 0

    def acquire(self) -> int:
        if self._free_slots:
            return self._free_slots.pop(0)
        self._blocks.append([])
        if len(self._blocks) > self._host.shape[0]:
            self._widen_table(2 * self._host.shape[0], self._host.shape[1])
        return len(self._blocks) - 1

    def release(self, slot: int) -> None:
        """Give back the slot and its blocks; the pool keeps its size."""
        self.forget(slot)
        bisect.insort(self._free_slots, slot)

    def clear(self, slot: int) -> None:
        """Do nothing, since the kernel never reads entries that a row does not see."""

    def extend(self, slot: int, num_positions: int) -> None:
        blocks = self._blocks[slot]
        needed = -(-num_positions // BLOCK)
        if needed <= len(blocks):
            return
        if needed > self._host.shape[1]:
            self._widen_table(self._host.shape[0], max(needed, 2 * self._host.shape[1]))
        missing = needed - len(blocks)
        if missing > len(self._free_blocks):
            self._add_blocks(missing - len(self._free_blocks))
        for place in range(len(blocks), needed):
            blocks.append(self._free_blocks.pop())
            self._host[slot, place] = blocks[-1]
        self._stale = True

    def pack(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None = None,
    ) -> tuple[Tensor, PagedBatch]:
        for span in spans:
            self.extend(span.slot, span.start + span.width)
        max_width = max(span.width for span in spans)
        trees = parents is not None and any(parents)
        shape = Shape(len(spans), len(tokens), -(-max_width // 64) if trees else 0)
        vector = torch.empty(shape.size, dtype=torch.int64)
        lay_out(vector.numpy(), shape, tokens.cpu(), spans, parents, self.places)
        max_length = max(span.start + span.width for span in spans)
        device_vector = vector.to(self._device)
        ids, rows = shape.read(device_vector, self.table(), max_width, max_length, max_length)
        return ids, PagedBatch(rows, self.layer)

    def for_checks(self) -> PagedCache:
        """Return this cache, since the captured steps use it."""
        return self

    def _add_blocks(self, missing: int) -> None:
        """Enlarge the pools by at least `missing` blocks."""
        grown = 2 * self._num_blocks
        if self._limit is not None:
            grown = min(grown, self._limit)
        grown = max(grown, self._num_blocks + missing)
        new = range(grown - 1, self._num_blocks - 1, -1)
        self._free_blocks = [*new, *self._free_blocks]
        self._num_blocks = grown
        self.version += 1

    def _widen_table(self, num_slots: int, num_blocks: int) -> None:
        """Enlarge the table to [num_slots, num_blocks]."""
        old = self._host
        self._host = np.zeros((num_slots, num_blocks), dtype=np.int32)
        self._host[: old.shape[0], : old.shape[1]] = old
        self._table = None
        self.version += 1

    def table(self) -> Tensor:
        """Return [slots, blocks per row] int32 on the device: the block of every position // BLOCK."""
        if self._table is None or self._stale:
            with torch.inference_mode(False):
                host = torch.from_numpy(self._host)
                if self._table is None:
                    self._table = torch.zeros_like(host, device=self._device)
                # waits for the copy, since the next row to grow writes to the source
                self._table.copy_(host)
            self._stale = False
        return self._table

    def layer(self, index: int, like: Tensor) -> Tensor:
        """Return [places, 2 * Hkv, D], with room for all blocks. like: [N, 2 * Hkv, D] new entries."""
        while len(self.layers) <= index:
            self.layers.append(None)
        pool = self.layers[index]
        num_places = self._num_blocks * BLOCK
        if pool is None or pool.shape[0] < num_places:
            with torch.inference_mode(False):
                new = like.new_zeros((num_places, *like.shape[1:]))
                if pool is not None:
                    new[: pool.shape[0]] = pool
            pool = self.layers[index] = new
        return pool

    def places(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the places in a pool of positions [n] of slots [n], by the host's table."""
        blocks = self._host[slots, positions // BLOCK].astype(np.int64)
        return blocks * BLOCK + positions % BLOCK

    def places_on_device(self, slots: Tensor | int, positions: Tensor) -> Tensor:
        """Return the same of tensors on the device, without a copy to the host."""
        blocks = self.table()[slots, positions // BLOCK].to(torch.int64)
        return blocks * BLOCK + positions % BLOCK

    def num_bytes(self) -> int:
        """Return the bytes held now, those of free blocks too."""
        return sum(pool.nbytes for pool in self.layers if pool is not None)

    def read(self, slot: int, start: int, stop: int) -> list[Tensor]:
        places = self._places_of_slice(slot, start, stop)
        return [
            pool.index_select(0, places).transpose(0, 1) for pool in self.layers if pool is not None
        ]

    def write(self, slot: int, start: int, entries: Sequence[Tensor]) -> None:
        stop = start + entries[0].shape[1]
        self.extend(slot, stop)
        places = self._places_of_slice(slot, start, stop)
        for index, entry in enumerate(entries):
            new = entry.transpose(0, 1)
            self.layer(index, new).index_copy_(0, places, new)

    def copy_positions(self, slot: int, source: Sequence[int], start: int) -> None:
        old = self.places_on_device(slot, torch.tensor(source, device=self._device))
        new = self._places_of_slice(slot, start, start + len(source))
        for pool in self.layers:
            if pool is not None:
                pool.index_copy_(0, new, pool.index_select(0, old))

    def _places_of_slice(self, slot: int, start: int, stop: int) -> Tensor:
        """Return the places of a row's positions [start, stop), on the device."""
        positions = torch.arange(start, stop, device=self._device)
        return self.places_on_device(slot, positions)
