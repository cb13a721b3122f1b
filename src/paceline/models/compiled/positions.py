"""Tables by position that compiled code reads, and that grow with the longest row.

Angles: float32 [positions, tables, 2 * HALF_TURNED], cosines and then sines.
Biases, by the distance from key to query: a line with the int64 length S of a row of numbers, then
float32 [H, S]; the last 16 numbers of a row are zeros, and before them the distances fall to 0. So the
biases of the keys 0, 1, ... of a query are neighbours, and a table's address tells all of it: a job of
another thread reads either the old table or the new one. Symbols: H heads.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.models.compiled import tables as t
from paceline.models.compiled.memory import field
from paceline.models.compiled.vectors import compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from paceline.models.compiled.facts import Facts, LayerFacts

_FEWEST: Final = 256  # positions of a first table
_HEADER: Final = 16  # float32 numbers of a table's first line
_MARGIN: Final = 16  # numbers after a row that a vector may read

_lock = threading.Lock()  # of tables that grow


def _renew_lock() -> None:
    """Make a lock that no thread of a forked child's parent holds."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class PositionTables:
    """The tables of a model, whose addresses stand in the tables of the model and its layers."""

    def __init__(
        self, facts: Facts, layers: Sequence[LayerFacts], model: np.ndarray, rows: np.ndarray
    ) -> None:
        """model, rows: the tables in which addresses are written; rows: of the layers."""
        self._angles = facts.angles if facts.half_turned else None
        self._num_positions = facts.num_positions
        self._model, self._rows = model, rows
        # by function, since layers may share one: the layers that add it
        self._biases: dict[Callable[[int], Tensor], list[int]] = {}
        for index, layer in enumerate(layers):
            if layer.bias is not None:
                self._biases.setdefault(layer.bias, []).append(index)
        # old ones too: another thread's job may still read them
        self._kept: list[Tensor | np.ndarray] = []
        self._length = 0
        if self._angles is None and not self._biases:
            self._length = self._num_positions  # there is nothing to grow

    def reserve(self, num_positions: int) -> None:
        """Make the tables cover positions below `num_positions`."""
        if num_positions <= self._length:
            return
        with _lock:
            if num_positions <= self._length:  # another thread was first
                return
            wanted = min(max(num_positions, 2 * self._length, _FEWEST), self._num_positions)
            length = max(wanted, num_positions)
            if self._angles is not None:
                angles = self._angles(length)
                self._model[t.ANGLE_TABLES] = angles.shape[1]
                self._model[t.ANGLES] = angles.data_ptr()
                self._kept.append(angles)
            for bias, layers in self._biases.items():
                table = _bias_table(bias(length).numpy())
                self._rows[layers, t.BIAS] = table.ctypes.data
                self._kept.append(table)
            self._length = length  # last: whoever finds it long enough does not wait for the lock


def _bias_table(by_distance: np.ndarray) -> np.ndarray:
    """Return the table of biases [H, distances]."""
    heads, length = by_distance.shape
    table = np.zeros(_HEADER + heads * (length + _MARGIN), np.float32)
    table[:2].view(np.int64)[0] = length + _MARGIN
    table[_HEADER:].reshape(heads, -1)[:, :length] = by_distance[:, ::-1]
    return table


@compiled
def bias_of(table, head, position):
    """Return the address of a head's bias of key 0 for a query at a position; 0 without a table."""
    if table == 0:
        return 0
    room = field(table, 0)
    return table + 4 * (_HEADER + head * room + room - _MARGIN - 1 - position)
