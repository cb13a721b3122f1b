"""Keys and values of all rows of one model.

A row owns a slot. Every layer keeps one tensor [slots, 2 * Hkv, positions, D], keys before values, grown
in blocks and shaped by the first entries it gets, so any architecture fits. (With positions before heads
an entry would be written in one piece, but the cache would be read up to half as fast.) A row's owner
keeps the number of its cached positions: rolling back is forgetting positions, nothing is copied.
Neighbouring slots form one slice, so a full batch is one attention call. Storage is kept while it is
large enough; under a bound it never holds more than its rows need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from paceline.models.attention import RowBatch
from paceline.models.packing import ChainMasks
from paceline.models.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.packing import Span

BLOCK: Final = 128  # positions; capacity grows by at least this much
_CHECK_BLOCK: Final = 8  # positions; short texts of self-checks cross it
_CPU: Final = torch.device("cpu")


class RowCache(Slots):
    """A `KVCache` of slots in one tensor per layer."""

    stores_all_first: Final = False

    def __init__(
        self, device: torch.device = _CPU, block: int = BLOCK, has_sources: bool = False
    ) -> None:
        """block: positions by which capacity grows. has_sources: whether the model has an encoder."""
        self.sources = RowCache(device, block) if has_sources else None
        super().__init__(self.sources)
        self.block = block
        self.layers: list[Tensor | None] = []
        self._device = device
        self._chain_masks = ChainMasks()
        self._num_positions = 0  # of the longest row

    @property
    def max_length(self) -> int | None:
        return None if self._limit is None else self._limit // max(1, len(self._lengths))

    def rounded(self, num_positions: int) -> int:
        """Return the least number of positions held for a row that needs `num_positions`."""
        return num_positions

    def release(self, slot: int) -> None:
        """Give a slot back, and storage that no row needs."""
        super().release(slot)
        self._num_positions = max(self._lengths, default=0)
        if self._exact_fit or not self._lengths:
            self._give_back()

    def _blocks(self) -> int:
        """Return the positions that the longest row needs, in whole blocks."""
        return -(-self._num_positions // self.block) * self.block

    def _give_back(self) -> None:
        """Free storage that no row needs. One slot's is kept for the next row, unless exact_fit."""
        slots, positions = len(self._lengths), self._blocks()
        for index, storage in enumerate(self.layers):
            if storage is None or (storage.shape[0] == 1 and not self._exact_fit):
                continue
            if not slots:
                self.layers[index] = None
            elif storage.shape[0] > slots or storage.shape[2] > positions:
                self.layers[index] = storage[:slots, :, :positions].clone()

    def forget(self, slot: int) -> None:
        """Free a row's positions until it extends again; their keys and values are lost."""
        self._lengths[slot] = 0
        self._num_positions = max(self._lengths, default=0)

    def clear(self, slot: int) -> None:
        """Zero a slot: masked positions enter the product with weight 0, and 0 * nan is nan."""
        with torch.inference_mode():  # as the entries were made
            for storage in self.layers:
                if storage is not None and slot < storage.shape[0]:
                    storage[slot].zero_()
        if self.sources is not None:
            self.sources.clear(slot)

    def extend(self, slot: int, num_positions: int) -> None:
        if num_positions > self._lengths[slot]:
            self._lengths[slot] = num_positions
            self._num_positions = max(self._num_positions, num_positions)

    def pack(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None = None,
    ) -> tuple[Tensor, RowBatch]:
        for span in spans:
            self.extend(span.slot, span.start + span.width)
        masks = self._chain_masks
        batch = RowBatch(spans, self.layer, self._device, masks, parents, self.sources)
        return tokens.to(self._device), batch

    def for_checks(self) -> RowCache:
        """Return an empty cache of small blocks, so that short texts cross them."""
        return RowCache(self._device, _CHECK_BLOCK, self.sources is not None)

    def layer(self, index: int, like: Tensor) -> Tensor:
        """Return the layer's storage, with room for all slots and the positions they need.

        like: [N, 2 * Hkv, D] new entries, which give heads, width, dtype and device.
        """
        while len(self.layers) <= index:
            self.layers.append(None)
        storage = self.layers[index]
        if (
            storage is None
            or storage.shape[0] < len(self._lengths)
            or storage.shape[2] < self._num_positions
        ):
            storage = self.layers[index] = self._grow(storage, like)
        return storage

    def _grow(self, old: Tensor | None, like: Tensor) -> Tensor:
        """Return storage with room for all slots and positions, with the old entries."""
        slots, positions = self._shape(*((0, 0) if old is None else (old.shape[0], old.shape[2])))
        # zeros, not empty: masked positions enter the product with weight 0, and 0 * nan is nan;
        # zeros are written, so that decoding does not wait for page faults
        new = like.new_empty((slots, like.shape[1], positions, like.shape[2])).zero_()
        if old is not None:
            slots, positions = min(slots, old.shape[0]), min(positions, old.shape[2])
            new[:slots, :, :positions] = old[:slots, :, :positions]
        return new

    def _shape(self, old_slots: int, old_positions: int) -> tuple[int, int]:
        """Return (slots, positions) to grow to, with spare room as far as the bound allows."""
        slots, positions = len(self._lengths), self._blocks()
        if self._exact_fit:
            return slots, positions
        many, long = max(slots, old_slots), positions
        if slots > old_slots:  # an ended row may have been longer than all current ones
            many = max(slots, 2 * old_slots)
        else:
            long = max(positions, (old_positions + old_positions // 2) // self.block * self.block)
        smallest = (slots, self._num_positions)
        if self._limit is None:
            return many, long
        wanted = ((many, long), (slots, long), (many, positions), (slots, positions))
        return next((s for s in wanted if s[0] * s[1] <= self._limit), smallest)

    def num_bytes(self) -> int:
        """Return the bytes held now, by all slots together."""
        own = sum(storage.nbytes for storage in self.layers if storage is not None)
        return own if self.sources is None else own + self.sources.num_bytes()

    def read(self, slot: int, start: int, stop: int) -> list[Tensor]:
        return [
            storage[slot, :, start:stop].clone() for storage in self.layers if storage is not None
        ]

    def write(self, slot: int, start: int, entries: Sequence[Tensor]) -> None:
        stop = start + entries[0].shape[1]
        self.extend(slot, stop)
        for index, entry in enumerate(entries):
            self.layer(index, entry.transpose(0, 1))[slot, :, start:stop] = entry

    def copy_positions(self, slot: int, source: Sequence[int], start: int) -> None:
        stop = start + len(source)
        places = torch.tensor(source, device=self._device)
        for storage in self.layers:
            if storage is not None:
                storage[slot, :, start:stop] = storage[slot].index_select(1, places)
