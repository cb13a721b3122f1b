"""The inner products of packed weights with rows of inputs, emitted for one kind of processor.

Weights [O, I] are packed by 16 outputs and by words of four bytes along the inputs (two bfloat16 or one
float32): a block of 16 outputs holds, word after word, the words of its 16 outputs, 64 bytes a word. So
a lane is an output, nothing is summed across lanes, and the sum of an output is one chain of
instructions in the order of the inputs. **That chain is the same for every number of rows**, which is
why the bits of a token do not depend on its neighbours. AMX reads the same layout.

A tile is r rows times b blocks of sums that stay in registers while the inputs pass. Symbols: O
outputs, I inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from paceline.models.compiled.simd import (
    F32,
    I8,
    I32,
    I64,
    V16F,
    V16I,
    V32B,
    broadcast,
    const,
    declared,
    load_value,
    pointer,
    splat_constant,
    store_value,
)

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP: Final = 4  # blocks of a group, 64 outputs: the unit of work
BLOCK_BYTES: Final = 64  # of one word of a block's outputs
AMX_ROWS: Final = 16
AMX_WORDS: Final = 16  # words of a tile
TILE_CONFIG_BYTES: Final = 64

# (largest number of rows, blocks): sums in registers, by the registers there are
_WIDE: Final = ((6, 4), (12, 2))  # 32 registers of 512 bits
_NARROW: Final = ((1, 4), (3, 2), (6, 1))  # 16 of 256 bits, or 32 of 128


# --- one word's step: sums += weights * inputs ---------------------------------------------------------

_EIGHT_SIGNATURE: Final = (types.int64,) * 9


def _dot_bf16(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Multiply pairs of bfloat16 by the processor's own instruction."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = declared(builder, name, V16F, [V16F, V32B, V32B])
    pair = builder.bitcast(broadcast(builder, word, V16I), V32B)
    return builder.call(dot, [sums, builder.bitcast(weights, V32B), pair])


def _widened_bf16(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Multiply pairs of bfloat16 as float32, the even input first."""
    fused = declared(builder, "llvm.fma.v16f32", V16F, [V16F] * 3)

    def halves(value: Any, kind: Any) -> tuple[Any, Any]:
        number: Callable[[int], Any] = (
            (lambda n: ir.Constant(I32, n))
            if kind is I32
            else (lambda n: ir.Constant(V16I, [n] * 16))
        )
        even = builder.shl(value, number(16))
        odd = builder.and_(value, number(-65536))
        return even, odd

    w_even, w_odd = (builder.bitcast(half, V16F) for half in halves(weights, V16I))
    x_even, x_odd = (
        broadcast(builder, builder.bitcast(half, F32), V16F) for half in halves(word, I32)
    )
    sums = builder.call(fused, [w_even, x_even, sums])
    return builder.call(fused, [w_odd, x_odd, sums])


def _float32(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    fused = declared(builder, "llvm.fma.v16f32", V16F, [V16F] * 3)
    x = broadcast(builder, builder.bitcast(word, F32), V16F)
    return builder.call(fused, [builder.bitcast(weights, V16F), x, sums])


# --- tiles ----------------------------------------------------------------------------------------


class _Tile:
    """Emits the loop over the words for r rows and b blocks.

    Arguments of a slab: weights, bytes between blocks, inputs, bytes between rows of inputs, number of
    words, sums, bytes between rows of sums, whether the sums start at zero, rows.
    """

    def __init__(self, step: Any, rows: int, blocks: int) -> None:
        self._step, self._rows, self._blocks = step, rows, blocks

    def emit(self, builder: Any, values: Any, first_block: int) -> None:
        """Emit the tile of blocks `first_block` and following."""
        weights, block_stride, x, x_stride, words, sums, sums_stride, fresh = values
        weights = builder.add(weights, builder.mul(block_stride, const(first_block)))
        sums = builder.add(sums, const(BLOCK_BYTES * first_block))
        places = [
            [
                builder.add(
                    sums, builder.add(builder.mul(sums_stride, const(r)), const(BLOCK_BYTES * b))
                )
                for b in range(self._blocks)
            ]
            for r in range(self._rows)
        ]
        w_at = [
            builder.add(weights, builder.mul(block_stride, const(b))) for b in range(self._blocks)
        ]
        x_at = [builder.add(x, builder.mul(x_stride, const(r))) for r in range(self._rows)]
        begin, resume = builder.block, builder.append_basic_block("resume")
        loop, done = builder.append_basic_block("words"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("!=", fresh, const(0)), loop, resume)
        builder.position_at_end(resume)
        before = [[load_value(builder, at, V16F, 4) for at in row] for row in places]
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(I64)
        at.add_incoming(const(0), begin)
        at.add_incoming(const(0), resume)
        totals = [[builder.phi(V16F) for _ in range(self._blocks)] for _ in range(self._rows)]
        for r, row in enumerate(totals):
            for b, total in enumerate(row):
                total.add_incoming(splat_constant(0.0), begin)
                total.add_incoming(before[r][b], resume)
        w_offset = builder.mul(at, const(BLOCK_BYTES))
        x_offset = builder.mul(at, const(4))
        loaded = [load_value(builder, builder.add(a, w_offset), V16I, 64) for a in w_at]
        new = []
        for r in range(self._rows):
            word = load_value(builder, builder.add(x_at[r], x_offset), I32, 4)
            new.append([self._step(builder, totals[r][b], w, word) for b, w in enumerate(loaded)])
        following = builder.add(at, const(1))
        at.add_incoming(following, builder.block)
        for r, row in enumerate(totals):
            for b, total in enumerate(row):
                total.add_incoming(new[r][b], builder.block)
        builder.cbranch(builder.icmp_signed("<", following, words), loop, done)
        builder.position_at_end(done)
        for r, row in enumerate(places):
            for b, place in enumerate(row):
                store_value(builder, place, new[r][b], 4)


def make_slab(step: Any, shapes: tuple[tuple[int, int], ...], tile: Any = None) -> Any:
    """Return an intrinsic: the sums of a group of 4 blocks for 1 to the largest number of rows."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        *shared, rows = values
        end = builder.append_basic_block("slab.end")
        switch = builder.switch(rows, end)
        least = 1
        for most, blocks in shapes:
            for count in range(least, most + 1):
                case = builder.append_basic_block(f"rows.{count}")
                switch.add_case(const(count), case)
                builder.position_at_end(case)
                for first in range(0, GROUP, blocks):
                    (tile or _Tile)(step, count, blocks).emit(builder, shared, first)
                builder.branch(end)
            least = most + 1
        builder.position_at_end(end)
        return context.get_dummy_value()

    @intrinsic
    def slab(typingctx, w, block_stride, x, x_stride, words, out, out_stride, fresh, rows):
        return types.void(*_EIGHT_SIGNATURE), codegen

    return slab


# --- int8 -----------------------------------------------------------------------------------------

INT8_GROUP: Final = 8  # words of inputs, 32 numbers, that share a scale
_WIDE_INT8: Final = ((3, 4), (6, 2), (12, 1))
_NARROW_INT8: Final = ((1, 2), (3, 1))
_EXCESS: Final = 128  # weights are stored as unsigned bytes, this much larger


def _dot_vnni(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Add the products of four unsigned weights and signed inputs by the processor's instruction."""
    dot = declared(builder, "llvm.x86.avx512.vpdpbusd.512", V16I, [V16I] * 3)
    return builder.call(dot, [sums, weights, broadcast(builder, word, V16I)])


def _widened_int8(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Add the same products one by one, which gives the same integers."""
    for k in range(4):
        shift = ir.Constant(V16I, [8 * k] * 16)
        weight = builder.and_(builder.lshr(weights, shift), ir.Constant(V16I, [255] * 16))
        number = builder.ashr(builder.shl(word, ir.Constant(I32, 24 - 8 * k)), ir.Constant(I32, 24))
        sums = builder.add(sums, builder.mul(weight, broadcast(builder, number, V16I)))
    return sums


class _Int8Tile:
    """Emits the loop over groups of 32 inputs: integer sums in a group, float32 sums of groups.

    A row of inputs holds its bytes, then a float32 scale and an int32 sum for each group. Integers are
    exact, so only the order of the groups matters, and it is the same for every number of rows.
    """

    def __init__(self, step: Any, rows: int, blocks: int) -> None:
        self._step, self._rows, self._blocks = step, rows, blocks

    def emit(self, builder: Any, values: Any, first_block: int) -> None:
        """Emit the tile of blocks `first_block` and following; sums always start at zero."""
        weights, block_stride, x, x_stride, words, sums, sums_stride, _ = values
        w_at = [
            builder.add(weights, builder.mul(block_stride, const(first_block + b)))
            for b in range(self._blocks)
        ]
        x_at = [builder.add(x, builder.mul(x_stride, const(r))) for r in range(self._rows)]
        scales = builder.mul(words, const(4))  # from a row's begin
        groups = builder.sdiv(words, const(INT8_GROUP))
        to_sums = builder.add(scales, builder.mul(groups, const(4)))
        begin, loop = builder.block, builder.append_basic_block("groups")
        done = builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        group = builder.phi(I64)
        group.add_incoming(const(0), begin)
        totals = [[builder.phi(V16F) for _ in range(self._blocks)] for _ in range(self._rows)]
        for row in totals:
            for total in row:
                total.add_incoming(splat_constant(0.0), begin)
        at = builder.mul(group, const(4))
        parts = []
        for r in range(self._rows):
            of_group = load_value(builder, builder.add(builder.add(x_at[r], to_sums), at), I32, 4)
            start = builder.mul(of_group, ir.Constant(I32, -_EXCESS))
            parts.append([broadcast(builder, start, V16I)] * self._blocks)
        for word in range(INT8_GROUP):
            offset = builder.add(builder.mul(group, const(INT8_GROUP)), const(word))
            loaded = [
                load_value(
                    builder, builder.add(a, builder.mul(offset, const(BLOCK_BYTES))), V16I, 64
                )
                for a in w_at
            ]
            for r in range(self._rows):
                x_word = builder.add(x_at[r], builder.mul(offset, const(4)))
                number = load_value(builder, x_word, I32, 4)
                parts[r] = [
                    self._step(builder, part, w, number)
                    for part, w in zip(parts[r], loaded, strict=True)
                ]
        fused = declared(builder, "llvm.fma.v16f32", V16F, [V16F] * 3)
        following = builder.add(group, const(1))
        group.add_incoming(following, builder.block)
        new = []
        for r in range(self._rows):
            scale = load_value(builder, builder.add(builder.add(x_at[r], scales), at), F32, 4)
            factor = broadcast(builder, scale, V16F)
            new.append(
                [
                    builder.call(fused, [builder.sitofp(part, V16F), factor, total])
                    for part, total in zip(parts[r], totals[r], strict=True)
                ]
            )
            for total, number in zip(totals[r], new[r], strict=True):
                total.add_incoming(number, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, groups), loop, done)
        builder.position_at_end(done)
        for r in range(self._rows):
            for b in range(self._blocks):
                row = builder.add(sums, builder.mul(sums_stride, const(r)))
                place = builder.add(row, const(BLOCK_BYTES * (first_block + b)))
                store_value(builder, place, new[r][b], 4)


# --- AMX ------------------------------------------------------------------------------------------


def _tile_number(number: int) -> ir.Constant:
    return ir.Constant(I8, number)


def make_amx_slab(row_tiles: int) -> Any:
    """Return an intrinsic: the sums of a group for 16 or 32 rows, by tile registers 0 to 3.

    Always whole tiles of rows are computed, so inputs and sums have room for them. A tile's row is one
    chain of sums over the words, whatever the other rows hold.
    """
    blocks = GROUP // row_tiles

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        for first in range(0, GROUP, blocks):
            _emit_amx(builder, values, row_tiles, blocks, first)
        return context.get_dummy_value()

    @intrinsic
    def slab(typingctx, w, block_stride, x, x_stride, words, out, out_stride, fresh):
        return types.void(*(types.int64,) * 8), codegen

    return slab


def _emit_amx(builder: Any, values: Any, row_tiles: int, blocks: int, first: int) -> None:
    weights, block_stride, x, x_stride, words, sums, sums_stride, fresh = values
    byte = I8.as_pointer()
    nothing = ir.VoidType()
    zero = declared(builder, "llvm.x86.tilezero", nothing, [I8])
    load = declared(builder, "llvm.x86.tileloadd64", nothing, [I8, byte, I64])
    save = declared(builder, "llvm.x86.tilestored64", nothing, [I8, byte, I64])
    dot = declared(builder, "llvm.x86.tdpbf16ps", nothing, [I8, I8, I8])
    tiles = [(r, b, _tile_number(r * blocks + b)) for r in range(row_tiles) for b in range(blocks)]
    x_tiles = [_tile_number(4 + r) for r in range(row_tiles)]

    def place(r: int, b: int) -> Any:
        row = builder.mul(sums_stride, const(AMX_ROWS * r))
        at = builder.add(builder.add(sums, row), const(BLOCK_BYTES * (first + b)))
        return pointer(builder, at, I8)

    clear, resume = builder.append_basic_block("clear"), builder.append_basic_block("resume")
    loop, done = builder.append_basic_block("words"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("!=", fresh, const(0)), clear, resume)
    builder.position_at_end(clear)
    for _, _, number in tiles:
        builder.call(zero, [number])
    builder.branch(loop)
    builder.position_at_end(resume)
    for r, b, number in tiles:
        builder.call(load, [number, place(r, b), sums_stride])
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(I64)
    at.add_incoming(const(0), clear)
    at.add_incoming(const(0), resume)
    for r, number in enumerate(x_tiles):
        row = builder.add(x, builder.mul(x_stride, const(AMX_ROWS * r)))
        begin = builder.add(row, builder.mul(at, const(4)))
        builder.call(load, [number, pointer(builder, begin, I8), x_stride])
    for b in range(blocks):
        block = builder.add(weights, builder.mul(block_stride, const(first + b)))
        begin = builder.add(block, builder.mul(at, const(BLOCK_BYTES)))
        number = _tile_number(6 + b % 2)
        builder.call(load, [number, pointer(builder, begin, I8), const(BLOCK_BYTES)])
        for r, rows in enumerate(x_tiles):
            builder.call(dot, [_tile_number(r * blocks + b), rows, number])
    following = builder.add(at, const(AMX_WORDS))
    at.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, words), loop, done)
    builder.position_at_end(done)
    for r, b, number in tiles:
        builder.call(save, [number, place(r, b), sums_stride])


@intrinsic
def configure_tiles(typingctx, address):
    """Set the tile registers' shapes from 64 bytes at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        load = declared(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [I8.as_pointer()])
        builder.call(load, [pointer(builder, values[0], I8)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release_tiles(typingctx):
    """Give the tile registers back, so that the system does not save them."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.call(declared(builder, "llvm.x86.tilerelease", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), codegen


def tile_config() -> bytes:
    """Return the configuration of eight tiles of 16 rows and 64 bytes."""
    return bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[AMX_ROWS] * 8, *[0] * 8])


# --- by processor and weights ---------------------------------------------------------------------


def slab_for(kernels: str, weights: str) -> tuple[Any, int]:
    """Return the slab for a processor and weights of bfloat16, float32 or int8, and its most rows."""
    wide = kernels in ("amx", "avx512_bf16", "avx512")
    if weights == "int8":
        step = _dot_vnni if kernels in ("amx", "avx512_bf16") else _widened_int8
        shapes = _WIDE_INT8 if wide else _NARROW_INT8
        return make_slab(step, shapes, _Int8Tile), shapes[-1][0]
    shapes = _WIDE if wide else _NARROW
    if weights == "float32":
        return make_slab(_float32, shapes), shapes[-1][0]
    step = _dot_bf16 if kernels == "avx512_bf16" else _widened_bf16
    return make_slab(step, shapes), shapes[-1][0]
