"""Compiled code writes to sums of numbers of which the first is 0.

Code generation may take any part of such a sum as the pointer, and LLVM removes what is written to an
offset from a null pointer.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from numba import types

from paceline.models.compiled import native
from paceline.models.compiled.simd import load, store


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
def test_no_sum_is_taken_for_an_offset_from_null(function: Any) -> None:
    symbol, code = native._compile(function, 3, types.void)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), native._machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    add = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(engine.get_function_address(symbol))
    tile = np.ones((3, 64), np.float32)
    numbers = np.arange(64, dtype=np.float32)

    add(tile.ctypes.data, numbers.ctypes.data, 3)

    assert (tile == numbers + 1).all()
