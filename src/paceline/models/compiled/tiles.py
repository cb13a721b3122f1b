"""The inner products of packed weights with rows of inputs, emitted for one kind of processor.

Weights [O, I] are packed by 16 outputs and by words of four bytes along the inputs (two bfloat16 or one
float32): a block of 16 outputs holds, word after word, the words of its 16 outputs, 64 bytes a word. So
a lane is an output, nothing is summed across lanes, and the sum of an output is one chain of
instructions in the order of the inputs. **That chain is the same for every number of rows**, which is
why the bits of a token do not depend on its neighbours. `amx.py` reads the same layout.

A tile is r rows times b blocks of sums that stay in registers while the inputs pass. Symbols: O
outputs, I inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from paceline.models.compiled.vectors import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    V16F,
    V16I,
    V32B,
    broadcast,
    const,
    declared,
    fused,
    load_value,
    pointer,
    splat_constant,
    store_value,
)

if TYPE_CHECKING:
    from collections.abc import Callable

Grid: TypeAlias = list[list[Any]]  # LLVM's values by row and block of a tile

GROUP: Final = 4  # blocks of a group, 64 outputs: the unit of work
BLOCK_BYTES: Final = 64  # of one word of a block's outputs


class TileShape(NamedTuple):
    """A tile: its largest number of rows, and its blocks; its sums stay in registers."""

    rows: int
    blocks: int


class TilesBySize(NamedTuple):
    """The tiles for few rows, which read many blocks at once, and for more."""

    few: TileShape
    many: TileShape


WIDE: Final = TilesBySize(TileShape(6, 4), TileShape(14, 2))  # 32 registers of 512 bits
NARROW: Final = TilesBySize(TileShape(1, 4), TileShape(6, 1))  # 16 of 256 bits, or 32 of 128


# --- one word's step: sums += weights * inputs -----------------------------------------------


def dot_bf16(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Multiply pairs of bfloat16 with the processor's own instruction."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = declared(builder, name, V16F, [V16F, V32B, V32B])
    pair = builder.bitcast(broadcast(builder, word, V16I), V32B)
    return builder.call(dot, [sums, builder.bitcast(weights, V32B), pair])


def widened_bf16(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Multiply pairs of bfloat16 as float32, the even input first."""

    def halves(value: Any, kind: Any) -> tuple[Any, Any]:
        def number(n: int) -> ir.Constant:
            return ir.Constant(kind, n if kind is I32 else [n] * LANES)

        return builder.shl(value, number(16)), builder.and_(value, number(-65536))

    w_even, w_odd = (builder.bitcast(half, V16F) for half in halves(weights, V16I))
    x_even, x_odd = (
        broadcast(builder, builder.bitcast(half, F32), V16F) for half in halves(word, I32)
    )
    return fused(builder, w_odd, x_odd, fused(builder, w_even, x_even, sums))


def float32(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Multiply one float32 of each output."""
    x = broadcast(builder, builder.bitcast(word, F32), V16F)
    return fused(builder, builder.bitcast(weights, V16F), x, sums)


# --- tiles ----------------------------------------------------------------------------------------


def spaced(builder: Any, start: Any, stride: Any, count: int, first: int = 0) -> list[Any]:
    """Return the addresses start + k * stride, in bytes, of `count` numbers k from `first` on."""
    return [builder.add(start, builder.mul(stride, const(first + k))) for k in range(count)]


def sum_places(builder: Any, values: Any, rows: int, blocks: int) -> Grid:
    """Return the addresses of a tile's sums. values: a slab's arguments."""
    starts = spaced(builder, values[5], values[6], rows)
    return [spaced(builder, start, const(BLOCK_BYTES), blocks) for start in starts]


def fetch_ahead(builder: Any, values: Any, blocks: int, words_done: Any) -> None:
    """Emit the reading of later weights into the cache. values: a slab's arguments."""
    at = builder.add(values[8], builder.mul(words_done, values[9]))
    name, byte = "llvm.prefetch.p0", I8.as_pointer()
    fetch = declared(builder, name, ir.VoidType(), [byte, I32, I32, I32])
    read, locality, data = (ir.Constant(I32, n) for n in (0, 3, 1))
    for place in spaced(builder, at, values[1], blocks):
        builder.call(fetch, [pointer(builder, place, I8), read, locality, data])


def zeros(rows: int, blocks: int) -> Grid:
    """Return sums of nothing."""
    return [[splat_constant(0.0)] * blocks for _ in range(rows)]


def sum_phis(builder: Any, rows: int, blocks: int) -> Grid:
    """Return the sums of a tile in a loop; `enter` says where they come from."""
    return [[builder.phi(V16F) for _ in range(blocks)] for _ in range(rows)]


def enter(phis: Grid, sums: Grid, block: Any) -> None:
    """Let a loop's sums be `sums` where control comes from an LLVM block."""
    for phi_row, row in zip(phis, sums, strict=True):
        for phi, number in zip(phi_row, row, strict=True):
            phi.add_incoming(number, block)


def store_sums(builder: Any, places: Grid, sums: Grid) -> None:
    """Store a tile's sums at their addresses."""
    for place_row, row in zip(places, sums, strict=True):
        for place, number in zip(place_row, row, strict=True):
            store_value(builder, place, number, 4)


def emit_tile(step: Any, builder: Any, values: Any, rows: int, blocks: int) -> None:
    """Emit the loop over the words.

    values: see `make_slab`. step(builder, sums, weights, word) adds the products of one word.
    """
    weights, block_stride, x, x_stride, words, _, _, fresh, *_ = values
    places = sum_places(builder, values, rows, blocks)
    w_at = spaced(builder, weights, block_stride, blocks)
    x_at = spaced(builder, x, x_stride, rows)
    begin, resume = builder.block, builder.append_basic_block("resume")
    loop, done = builder.append_basic_block("words"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("!=", fresh, const(0)), loop, resume)
    builder.position_at_end(resume)
    before = [[load_value(builder, at, V16F, 4) for at in row] for row in places]
    builder.branch(loop)
    builder.position_at_end(loop)
    at, totals = builder.phi(I64), sum_phis(builder, rows, blocks)
    for block, sums in ((begin, zeros(rows, blocks)), (resume, before)):
        at.add_incoming(const(0), block)
        enter(totals, sums, block)
    w_offset, x_offset = builder.mul(at, const(BLOCK_BYTES)), builder.mul(at, const(4))
    loaded = [load_value(builder, builder.add(w, w_offset), V16I, 64) for w in w_at]
    fetch_ahead(builder, values, blocks, at)
    new = []
    for row, of_row in zip(totals, x_at, strict=True):
        word = load_value(builder, builder.add(of_row, x_offset), I32, 4)
        new.append([step(builder, total, w, word) for total, w in zip(row, loaded, strict=True)])
    following = builder.add(at, const(1))
    at.add_incoming(following, builder.block)
    enter(totals, new, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, words), loop, done)
    builder.position_at_end(done)
    store_sums(builder, places, new)


def make_slab(emit: Callable[..., None], shape: TileShape) -> Any:
    """Return an intrinsic: the sums of a shape's blocks for 1 to its largest number of rows.

    Its int64 arguments: weights, bytes between blocks, inputs, bytes between rows of inputs, number of
    words, sums, bytes between rows of sums, whether the sums start at zero, the address of as many
    blocks to read ahead, bytes that are read ahead of each per word, rows.
    emit(builder, values, rows, blocks): of a tile; values are the arguments but the last.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        *shared, rows = values
        end = builder.append_basic_block("slab.end")
        switch = builder.switch(rows, end)
        for count in range(1, shape.rows + 1):
            case = builder.append_basic_block(f"rows.{count}")
            switch.add_case(const(count), case)
            builder.position_at_end(case)
            emit(builder, shared, count, shape.blocks)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    @intrinsic
    def slab(
        typingctx,
        w,
        block_stride,
        x,
        x_stride,
        words,
        out,
        out_stride,
        fresh,
        ahead,
        ahead_step,
        rows,
    ):
        return types.void(*(types.int64,) * 11), codegen

    return slab
