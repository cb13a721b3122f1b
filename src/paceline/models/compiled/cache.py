"""The keys and values of rows for the compiled forward: one piece of memory per row.

A row's memory holds, layer after layer, the keys of each key-value head in blocks of 16 positions and
their values in blocks of 16 numbers, both packed as weights are (`tiles.py`). Rows grow on their own, so
nothing is padded to the longest one. Symbols: L layers, Hkv key-value heads, d head size, n positions.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from paceline.models.compiled.tables import rounded
from paceline.models.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

UNIT: Final = 64  # positions; capacities are its multiples
_LANES: Final = 16


def _plain(numbers: Tensor) -> np.ndarray:
    """Return numpy's view of numbers, bfloat16 as integers."""
    return numbers.view(torch.int16 if numbers.itemsize == 2 else torch.int32).numpy()


class CacheShape(NamedTuple):
    """The sizes of a model's keys and values; rooms are head sizes rounded up."""

    layers: int
    kv_heads: int
    head_dim: int
    head_room: int
    value_room: int
    dtype: torch.dtype

    @property
    def position_numbers(self) -> int:
        """Numbers of one position in all layers."""
        return self.layers * self.kv_heads * (self.head_room + self.value_room)


class PackedRows(Slots):
    """A `KVCache` of rows with memory of their own."""

    stores_all_first: Final = True
    block: Final = UNIT

    def __init__(self, shape: CacheShape, has_sources: bool = False) -> None:
        """has_sources: whether the model has an encoder."""
        self.sources = PackedRows(shape) if has_sources else None
        super().__init__(self.sources)
        self._shape = shape
        self._storage: list[Tensor | None] = []  # by slot
        self._addresses: list[int] = []
        self._capacities: list[int] = []  # positions that the storage holds
        # numpy's views of the storage by slot, made when they are needed
        self._plain_views: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._spares: list[Tensor] = []  # of rows that have ended, for the next ones

    @property
    def max_length(self) -> int | None:
        if self._limit is None:
            return None
        return self._limit // max(1, len(self._lengths)) // UNIT * UNIT

    def rounded(self, num_positions: int) -> int:
        """Return the least number of positions held for a row that needs `num_positions`."""
        return rounded(num_positions, UNIT)

    def acquire(self) -> int:
        """Return the lowest free slot and take it."""
        slot = super().acquire()
        if slot == len(self._storage):
            self._storage.append(None)
            self._addresses.append(0)
            self._capacities.append(0)
            if self._spares:
                self._keep(slot, self._spares.pop())
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. Its memory is kept for the next row, unless there is a bound.

        Once no row is left, the memory of one is kept.
        """
        super().release(slot)
        if self._exact_fit or (self._limit is not None and self.num_rows):
            self._drop(slot)
        while len(self._storage) > len(self._lengths):
            self._addresses.pop()
            self._capacities.pop()
            storage = self._storage.pop()
            self._plain_views.pop(len(self._storage), None)
            if storage is not None:
                self._spares.append(storage)
        if not self._lengths:
            del self._spares[:-1]

    def _drop(self, slot: int) -> None:
        self._plain_views.pop(slot, None)
        self._storage[slot], self._addresses[slot], self._capacities[slot] = None, 0, 0

    def _keep(self, slot: int, storage: Tensor) -> None:
        self._plain_views.pop(slot, None)
        self._storage[slot] = storage
        self._addresses[slot] = storage.data_ptr()
        self._capacities[slot] = storage.numel() // self._shape.position_numbers

    def forget(self, slot: int) -> None:
        """Free a row's positions until it extends again; their keys and values are lost."""
        self._lengths[slot] = 0
        if self._exact_fit:
            self._drop(slot)

    def clear(self, slot: int) -> None:
        """Zero a slot: positions that are not seen enter sums with weight 0, and 0 * nan is nan."""
        storage = self._storage[slot]
        if storage is not None:
            ctypes.memset(storage.data_ptr(), 0, storage.nbytes)
        if self.sources is not None:
            self.sources.clear(slot)

    def extend(self, slot: int, num_positions: int) -> None:
        if num_positions > self._lengths[slot]:
            self._lengths[slot] = num_positions
        if num_positions > self._capacities[slot]:
            self._grow(slot, num_positions)

    def _grow(self, slot: int, num_positions: int) -> None:
        least, old = self.rounded(num_positions), self._storage[slot]
        wanted = least
        if not self._exact_fit and self._limit is None:  # room for the next tokens
            wanted = self.rounded(max(2 * UNIT, least + self._capacities[slot] // 2))
        with torch.inference_mode():
            # zeros are written, so that decoding does not wait for page faults; all entries are finite.
            # Not by torch: in a forked child its threads are waited for without end
            new = torch.empty(wanted * self._shape.position_numbers, dtype=self._shape.dtype)
            ctypes.memset(new.data_ptr(), 0, new.nbytes)
            if old is not None:
                old_keys, old_values = self._views(old)
                keys, values = self._views(new)
                _plain(keys)[:, :, : old_keys.shape[2]] = _plain(old_keys)
                _plain(values)[:, :, :, : old_values.shape[3]] = _plain(old_values)
        self._keep(slot, new)

    def _views(self, storage: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of the keys and values of a row.

        Keys: [L, Hkv, n/16, words of d, 16, word]; values: [L, Hkv, d/16, n/word, 16, word].
        """
        shape, word = self._shape, 4 // storage.element_size()
        heads, capacity = shape.kv_heads, storage.numel() // shape.position_numbers
        layers = storage.view(shape.layers, -1)
        num_keys = heads * capacity * shape.head_room
        key_shape = (heads, capacity // _LANES, shape.head_room // word, _LANES, word)
        value_shape = (heads, shape.value_room // _LANES, capacity // word, _LANES, word)
        keys = layers[:, :num_keys].unflatten(1, key_shape)
        return keys, layers[:, num_keys:].unflatten(1, value_shape)

    def place(self, slot: int) -> tuple[int, int]:
        """Return the address of a row's memory and its capacity."""
        return self._addresses[slot], self._capacities[slot]

    def num_bytes(self) -> int:
        """Return the bytes held now, by all slots together."""
        kept = [*self._storage, *self._spares]
        own = sum(storage.nbytes for storage in kept if storage is not None)
        return own if self.sources is None else own + self.sources.num_bytes()

    def read(self, slot: int, start: int, stop: int) -> list[Tensor]:
        keys, values = self._whole(slot, start, stop)
        size = self._shape.head_dim
        return list(torch.cat([keys, values[..., : keys.shape[-1]]], dim=1)[..., :size].clone())

    def _whole(self, slot: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [L, Hkv, stop - start, d rounded up] of positions."""
        storage = self._storage[slot]
        if storage is None:
            raise IndexError(f"slot {slot} holds no positions")
        keys, values = self._views(storage)
        first, last = start // _LANES, -(-stop // _LANES)
        word = keys.shape[-1]
        keys = keys[:, :, first:last].transpose(3, 4).flatten(4).flatten(2, 3)
        values = values[:, :, :, first * _LANES // word : last * _LANES // word]
        values = values.permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(2, 3)
        here = slice(start - first * _LANES, stop - first * _LANES)
        return keys[:, :, here], values[:, :, here]

    def write(self, slot: int, start: int, entries: Sequence[Tensor]) -> None:
        stacked = torch.stack(list(entries))  # [L, 2 Hkv, n, d]
        positions = torch.arange(start, start + stacked.shape[2])
        self.extend(slot, start + stacked.shape[2])
        self._put(slot, positions, *stacked.chunk(2, dim=1))

    def copy_positions(self, slot: int, source: Sequence[int], start: int) -> None:
        # by numpy, since torch takes ten times as long, and much longer while other processes run
        keys, values = self._grid(slot)
        word = values.shape[-1]
        for target, place in enumerate(source, start):  # ascending, so no source is overwritten
            keys[:, :, target // _LANES, :, target % _LANES] = keys[
                :, :, place // _LANES, :, place % _LANES
            ]
            values[:, :, :, target // word, :, target % word] = values[
                :, :, :, place // word, :, place % word
            ]

    def _grid(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Return numpy's views of a row's keys, where a word is one integer, and of its values."""
        grid = self._plain_views.get(slot)
        if grid is None:
            storage = self._storage[slot]
            assert storage is not None
            keys, values = self._views(storage)
            words = _plain(keys).view(np.int32)[..., 0]
            grid = self._plain_views[slot] = (words, _plain(values))
        return grid

    def _put(self, slot: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [L, Hkv, n, d] at positions [n]."""
        storage = self._storage[slot]
        assert storage is not None
        shape = self._shape
        all_keys, all_values = self._views(storage)
        word = all_keys.shape[-1]
        with torch.inference_mode():
            key_rows = F.pad(keys, (0, shape.head_room - keys.shape[-1])).unflatten(-1, (-1, word))
            value_rows = F.pad(values, (0, shape.value_room - values.shape[-1]))
            block, lane = positions // _LANES, positions % _LANES
            # an index on both sides of a slice puts the positions first
            all_keys[:, :, block, :, lane] = key_rows.movedim(2, 0)
            at, half = positions // word, positions % word
            all_values[:, :, :, at, :, half] = value_rows.unflatten(-1, (-1, _LANES)).movedim(2, 0)

    def for_checks(self) -> PackedRows:
        """Return an empty cache."""
        return PackedRows(self._shape, self.sources is not None)
