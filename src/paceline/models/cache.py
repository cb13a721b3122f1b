"""Keys and values of all rows of one model.

A row owns a slot. Every layer keeps one tensor [slots, 2 * kv heads, positions, head dim], keys before
values, grown in blocks and shaped by the first entries it sees, so any architecture fits. (Positions
before heads would be written in one piece, but is read up to half as fast.) What a row has cached is
a length that its owner keeps: rolling back is forgetting positions, nothing is copied or cleared.
Neighbouring slots form one slice, so a full batch is one attention call. Knows no attention.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BLOCK: Final = 128  # positions; capacity grows by at least this much


class RowCache:
    """Slots and their tensors; `acquire` a slot for a row, `release` it at its end."""

    def __init__(self, block: int = BLOCK) -> None:
        """block: positions by which capacity grows; a check takes a small one."""
        self._block = block
        self.layers: list[Tensor | None] = []
        self._free: list[int] = []
        self._num_slots = 0
        self._num_positions = 0

    def acquire(self) -> int:
        """The lowest free slot, so that rows in flight stay neighbours."""
        if self._free:
            return self._free.pop(0)
        self._num_slots += 1
        return self._num_slots - 1

    def release(self, slot: int) -> None:
        bisect.insort(self._free, slot)
        if len(self._free) == self._num_slots and self._num_slots > 1:
            self._num_slots, self._free = 0, []
            self.layers = []

    def clear(self, slot: int) -> None:
        """Zero a slot: masked positions enter the product with weight 0, and 0 * nan is nan."""
        with torch.inference_mode():  # as what is cached was made
            for storage in self.layers:
                if storage is not None and slot < storage.shape[0]:
                    storage[slot].zero_()

    def reserve(self, num_positions: int) -> None:
        """Make room for positions below `num_positions` in every slot."""
        if num_positions > self._num_positions:
            blocks = -(-num_positions // self._block)
            grown = self._num_positions + self._num_positions // 2
            self._num_positions = max(blocks * self._block, grown // self._block * self._block)

    def layer(self, index: int, like: Tensor) -> Tensor:
        """The layer's storage, with room for all slots and reserved positions.

        like: [N, 2 * Hkv, D] new entries, which give heads, width, dtype and device.
        """
        while len(self.layers) <= index:
            self.layers.append(None)
        storage = self.layers[index]
        if (
            storage is None
            or storage.shape[0] < self._num_slots
            or storage.shape[2] < self._num_positions
        ):
            storage = self.layers[index] = self._grow(storage, like)
        return storage

    def _grow(self, old: Tensor | None, like: Tensor) -> Tensor:
        slots = self._num_slots
        if old is not None:
            # doubling may have left more slots than are in use
            slots = max(slots, old.shape[0] * 2) if slots > old.shape[0] else old.shape[0]
        positions = max(self._num_positions, old.shape[2] if old is not None else 0)
        # zeros, not empty: masked positions enter the product with weight 0, and 0 * nan is nan;
        # written, not promised by the system: else decoding would wait for page after page
        new = like.new_empty((slots, like.shape[1], positions, like.shape[2])).zero_()
        if old is not None:
            new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def num_bytes(self) -> int:
        """Bytes held now, by all slots together."""
        return sum(storage.nbytes for storage in self.layers if storage is not None)

    def read(self, slot: int, start: int, stop: int) -> list[Tensor]:
        """Copies of a row's entries at positions [start, stop): [2 * Hkv, n, D] of every layer."""
        return [
            storage[slot, :, start:stop].clone() for storage in self.layers if storage is not None
        ]

    def write(self, slot: int, start: int, entries: Sequence[Tensor]) -> None:
        """Put what `read` gave at positions start, start + 1, ... of a row."""
        stop = start + entries[0].shape[1]
        self.reserve(stop)
        for index, entry in enumerate(entries):
            self.layer(index, entry.transpose(0, 1))[slot, :, start:stop] = entry

    def copy_positions(self, slot: int, source: Tensor, start: int) -> None:
        """Move a row's entries at positions `source` [n] to start, start + 1, ..."""
        stop = start + source.shape[0]
        for storage in self.layers:
            if storage is not None:
                storage[slot, :, start:stop] = storage[slot].index_select(1, source)
