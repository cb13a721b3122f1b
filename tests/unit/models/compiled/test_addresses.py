"""Compiled code writes to sums of numbers of which the first is 0.

Code generation may take any part of such a sum as the pointer, and LLVM's passes, run after it, remove
what is written to an offset from a null pointer.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.models.compiled.memory import load, store
from paceline.models.compiled.native import function_address

if TYPE_CHECKING:
    from pathlib import Path


def add_by_columns(tile: Any, numbers: Any, rows: Any) -> None:
    """Add 64 numbers to rows of 64."""
    for at in range(0, 256, 64):
        added = load(numbers + at)
        for row in range(rows):
            store(tile + 256 * row + at, load(tile + 256 * row + at) + added)


def add_by_rows(tile: Any, numbers: Any, rows: Any) -> None:
    """Add 64 numbers to rows of 64."""
    for row in range(rows):
        for at in range(0, 256, 64):
            added = load(tile + 256 * row + at) + load(numbers + at)
            store(tile + 256 * row + at, added)


@pytest.mark.parametrize("function", [add_by_columns, add_by_rows])
def test_no_sum_is_taken_for_an_offset_from_null(
    function: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    address = function_address("add", lambda: function, 3)
    add = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(address)
    tile, numbers = np.ones((3, 64), np.float32), np.arange(64, dtype=np.float32)

    add(tile.ctypes.data, numbers.ctypes.data, 3)

    assert (tile == numbers + 1).all()
