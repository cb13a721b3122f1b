"""A product of packed weights with any number of rows of inputs, for one kind of processor.

Weights are multiplied by groups of 64 outputs, and rows by blocks of 128: `make_product` computes one
group, `make_multiply` one group and block of the whole.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from paceline.models.compiled.amx import AMX_ROWS, make_amx_slab
from paceline.models.compiled.int8 import (
    NARROW_INT8,
    WIDE_INT8,
    dot_vnni,
    emit_int8_tile,
    widened_int8,
)
from paceline.models.compiled.memory import load, store
from paceline.models.compiled.rows import inputs_of
from paceline.models.compiled.tiles import (
    BLOCK_BYTES,
    DOT_BF16,
    FLOAT32,
    GROUP,
    NARROW,
    NARROW_WIDENED,
    WIDE,
    WIDE_WIDENED,
    WIDENED_BF16,
    TilesBySize,
    TileShape,
    emit_tile,
    make_slab,
)
from paceline.models.compiled.vectors import compiled

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_ROWS: Final = 128  # rows of inputs of a piece
TILE_BYTES: Final = BLOCK_ROWS * 64 * 4  # the sums of a piece
PART_WORDS: Final = 2048  # of a block, which several slabs find in the second-level cache
AHEAD: Final = 2048  # bytes of a block that are read before they are needed
ROOM_ROWS: Final = 32  # rows of buffers are rounded up to it, for AMX


def _tiles_for(kernels: str, weights: str) -> tuple[Callable[..., None], TilesBySize, int]:
    """Return the function that emits a tile, the tiles' shapes, and the bytes of a word of inputs.

    Arguments as in `make_product`.
    """
    is_wide = kernels in ("amx", "avx512_bf16", "avx512")
    if weights == "int8":
        step = dot_vnni if kernels in ("amx", "avx512_bf16") else widened_int8
        return partial(emit_int8_tile, step), WIDE_INT8 if is_wide else NARROW_INT8, 4
    if inputs_of(kernels, weights) == "widened":
        shapes = WIDE_WIDENED if is_wide else NARROW_WIDENED
        return partial(emit_tile, WIDENED_BF16), shapes, WIDENED_BF16.input_bytes
    sums = FLOAT32 if weights == "float32" else DOT_BF16
    return partial(emit_tile, sums), WIDE if is_wide else NARROW, sums.input_bytes


def make_product(kernels: str, weights: str) -> Callable[..., Any]:
    """Return product(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows).

    It computes the group of 64 outputs at address w: float32 sums [rows, 64] at `out`, beginning with
    what is there unless `fresh`. Strides are bytes. With AMX, inputs and sums have room for whole
    tiles of 16 rows. kernels: see `processor`; weights: `bfloat16`, `float32` or `int8`. Inputs are of
    the kind that `rows.inputs_of` tells.
    """
    if kernels == "amx" and weights == "bfloat16":
        return _amx_product()
    emit, shapes, input_bytes = _tiles_for(kernels, weights)
    multiply_few = _make_few(make_slab(emit, shapes.few), shapes.few)
    slab = make_slab(emit, shapes.many)
    multiply_many = _make_many(slab, shapes.many, input_bytes, weights != "int8")
    few = shapes.few.rows

    @compiled
    def product(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows):
        if rows <= few:
            multiply_few(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows)
        else:
            multiply_many(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows)

    return product


def _make_few(slab: Any, shape: TileShape) -> Callable[..., Any]:
    """Return a product for few rows. Memory bounds it, so several blocks are read side by side."""
    blocks = shape.blocks

    @compiled
    def multiply_few(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows):
        for first in range(0, GROUP, blocks):
            of, to = w + first * block_stride, out + first * BLOCK_BYTES
            ahead = of + AHEAD
            slab(
                of,
                block_stride,
                x,
                x_stride,
                words,
                to,
                out_stride,
                fresh,
                ahead,
                BLOCK_BYTES,
                rows,
            )

    return multiply_few


def _make_many(slab: Any, shape: TileShape, input_bytes: int, in_parts: bool) -> Callable[..., Any]:
    """Return a product for more rows, in slabs of equal numbers of them.

    While slabs pass over some blocks, each reads its share of the following ones into the cache, so
    memory is busy all the time. input_bytes: of a word's inputs. in_parts: whether sums may be
    continued, so that a part of long blocks stays in the cache for all slabs.
    """
    most, blocks = shape

    @compiled
    def multiply_many(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows):
        slabs = (rows + most - 1) // most
        part = PART_WORDS if in_parts and slabs > 1 else words
        for begin in range(0, words, part):
            count, zero = min(part, words - begin), fresh if begin == 0 else 0
            for first in range(0, GROUP, blocks):
                of, sums = w + first * block_stride + begin * BLOCK_BYTES, out + first * BLOCK_BYTES
                ahead, ahead_step, done = of + blocks * block_stride, BLOCK_BYTES // slabs, 0
                for k in range(slabs):
                    left = slabs - k
                    number = (rows - done + left - 1) // left
                    at, to = x + done * x_stride + input_bytes * begin, sums + done * out_stride
                    slab(
                        of,
                        block_stride,
                        at,
                        x_stride,
                        count,
                        to,
                        out_stride,
                        zero,
                        ahead,
                        ahead_step,
                        number,
                    )
                    ahead += count * ahead_step
                    done += number

    return multiply_many


def _amx_product() -> Callable[..., Any]:
    one, two = make_amx_slab(1), make_amx_slab(2)

    @compiled
    def product(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows):
        done = 0
        while rows - done > AMX_ROWS:
            at, to = x + done * x_stride, out + done * out_stride
            two(w, block_stride, at, x_stride, words, to, out_stride, fresh)
            done += 2 * AMX_ROWS
        if done < rows:
            at, to = x + done * x_stride, out + done * out_stride
            one(w, block_stride, at, x_stride, words, to, out_stride, fresh)

    return product


def make_multiply(kernels: str, weights: str) -> Callable[..., Any]:
    """Return multiply(weights, bias, words, x, x_stride, out, tokens, groups, piece).

    It computes one piece of a product: float32 sums [rows, 64] at `out`, with the bias [groups, 64] at
    address `bias` added unless that is 0. It returns (group, first row, rows). words: per row of
    inputs at `x`. x_stride: bytes between them. Pieces are numbered by blocks of rows, then groups.
    """
    product = make_product(kernels, weights)
    scales = 256 if weights == "int8" else 0  # bytes of a group's scales, which follow it

    @compiled
    def multiply(weights, bias, words, x, x_stride, out, tokens, groups, piece):
        block, group = piece // groups, piece % groups
        first = block * BLOCK_ROWS
        rows = min(BLOCK_ROWS, tokens - first)
        at = weights + group * (4 * words * 64 + scales)
        product(at, words * 64, x + first * x_stride, x_stride, words, out, 256, 1, rows)
        if scales:
            _scale_rows(out, at + 4 * words * 64, rows)
        if bias != 0:
            _add_to_rows(out, bias + 256 * group, rows)
        return group, first, rows

    return multiply


@compiled
def _scale_rows(tile, factors, rows):
    """Multiply every row of a tile of sums by 64 numbers."""
    for at in range(0, 256, 64):
        numbers = load(factors + at)
        for row in range(rows):
            store(tile + 256 * row + at, load(tile + 256 * row + at) * numbers)


@compiled
def _add_to_rows(tile, bias, rows):
    """Add 64 numbers to every row of a tile of sums."""
    for at in range(0, 256, 64):
        numbers = load(bias + at)
        for row in range(rows):
            store(tile + 256 * row + at, load(tile + 256 * row + at) + numbers)
