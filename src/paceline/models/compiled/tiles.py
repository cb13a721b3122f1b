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
# weights that are widened take more registers
WIDE_WIDENED: Final = TilesBySize(TileShape(5, 4), TileShape(12, 2))
NARROW_WIDENED: Final = TilesBySize(TileShape(2, 2), TileShape(6, 1))


# --- one word's step: sums += weights * inputs -----------------------------------------------


class Step(NamedTuple):
    """The products of one word of a tile.

    add(builder, sums, weights, inputs) returns sums with the products of the words of blocks, `weights`,
    and of the rows at the addresses `inputs`. input_bytes: of a word's inputs.
    """

    add: Callable[[Any, Grid, list[Any], list[Any]], Grid]
    input_bytes: int = 4


def _add_dots(builder: Any, sums: Grid, weights: list[Any], inputs: list[Any]) -> Grid:
    """Multiply pairs of bfloat16 with the processor's own instruction."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = declared(builder, name, V16F, [V16F, V32B, V32B])
    new = []
    for row, at in zip(sums, inputs, strict=True):
        word = load_value(builder, at, I32, 4)
        pair = builder.bitcast(broadcast(builder, word, V16I), V32B)
        new.append(
            [
                builder.call(dot, [total, builder.bitcast(w, V32B), pair])
                for total, w in zip(row, weights, strict=True)
            ]
        )
    return new


def _add_widened(builder: Any, sums: Grid, weights: list[Any], inputs: list[Any]) -> Grid:
    """Multiply pairs of bfloat16 as float32, the even inputs first; rows hold them as float32."""

    def number(n: int) -> ir.Constant:
        return ir.Constant(V16I, [n] * LANES)

    even = [builder.shl(w, number(16)) for w in weights]
    sums = _add_numbers(builder, sums, even, inputs)
    odd = [builder.and_(w, number(-65536)) for w in weights]
    return _add_numbers(builder, sums, odd, [builder.add(at, const(4)) for at in inputs])


def _add_numbers(builder: Any, sums: Grid, weights: list[Any], inputs: list[Any]) -> Grid:
    """Multiply one float32 of each output."""
    new = []
    for row, at in zip(sums, inputs, strict=True):
        x = broadcast(builder, load_value(builder, at, F32, 4), V16F)
        new.append(
            [
                fused(builder, builder.bitcast(w, V16F), x, total)
                for total, w in zip(row, weights, strict=True)
            ]
        )
    return new


DOT_BF16: Final = Step(_add_dots)
WIDENED_BF16: Final = Step(_add_widened, input_bytes=8)
FLOAT32: Final = Step(_add_numbers)


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


def emit_tile(step: Step, builder: Any, values: Any, rows: int, blocks: int) -> None:
    """Emit the loop over the words. values: see `make_slab`."""
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
    w_offset, x_offset = (builder.mul(at, const(size)) for size in (BLOCK_BYTES, step.input_bytes))
    loaded = [load_value(builder, builder.add(w, w_offset), V16I, 64) for w in w_at]
    fetch_ahead(builder, values, blocks, at)
    new = step.add(builder, totals, loaded, [builder.add(row, x_offset) for row in x_at])
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
