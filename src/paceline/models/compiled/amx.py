"""The inner products of bfloat16 weights on AMX: tile registers of 16 rows and 64 bytes.

They read what `tiles.py` packs: a tile of weights is 16 words of a block's 16 outputs.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from paceline.models.compiled.tiles import BLOCK_BYTES, GROUP, spaced
from paceline.models.compiled.vectors import I8, I64, const, declared, pointer

AMX_ROWS: Final = 16
AMX_WORDS: Final = 16  # words of a tile


def _register(number: int) -> ir.Constant:
    return ir.Constant(I8, number)


def make_amx_slab(row_tiles: int) -> Any:
    """Return an intrinsic: the sums of a group for 16 or 32 rows, by tile registers 0 to 3.

    Its int64 arguments are those of `make_slab`'s but the rows. Always whole tiles of rows are computed,
    so inputs and sums have room for them. A tile's row is one chain of sums over the words, whatever the
    other rows hold.
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
    """Emit the loop over the words for 1 or 2 tiles of rows and the blocks from `first` on.

    Registers 0 to 3 hold the sums, 4 and 5 the inputs, 6 and 7 the weights.
    """
    weights, block_stride, x, x_stride, words, _, sums_stride, fresh = values
    zero, load, save, dot = _instructions(builder)
    sums = _sum_tiles(builder, values, row_tiles, blocks, first)
    x_at = spaced(builder, x, builder.mul(x_stride, const(AMX_ROWS)), row_tiles)
    w_at = spaced(builder, weights, block_stride, blocks, first)
    clear, resume = builder.append_basic_block("clear"), builder.append_basic_block("resume")
    loop, done = builder.append_basic_block("words"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("!=", fresh, const(0)), clear, resume)
    builder.position_at_end(clear)
    for number, _ in sums:
        builder.call(zero, [number])
    builder.branch(loop)
    builder.position_at_end(resume)
    for number, place in sums:
        builder.call(load, [number, place, sums_stride])
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(I64)
    at.add_incoming(const(0), clear)
    at.add_incoming(const(0), resume)
    for r, row in enumerate(x_at):
        begin = builder.add(row, builder.mul(at, const(4)))
        builder.call(load, [_register(4 + r), pointer(builder, begin, I8), x_stride])
    for b, block in enumerate(w_at):
        begin = builder.add(block, builder.mul(at, const(BLOCK_BYTES)))
        number = _register(6 + b % 2)
        builder.call(load, [number, pointer(builder, begin, I8), const(BLOCK_BYTES)])
        for r in range(row_tiles):
            builder.call(dot, [_register(r * blocks + b), _register(4 + r), number])
    following = builder.add(at, const(AMX_WORDS))
    at.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, words), loop, done)
    builder.position_at_end(done)
    for number, place in sums:
        builder.call(save, [number, place, sums_stride])


def _instructions(builder: Any) -> tuple[Any, Any, Any, Any]:
    """Return the instructions that clear, load, store and multiply tile registers."""
    byte, nothing = I8.as_pointer(), ir.VoidType()
    return (
        declared(builder, "llvm.x86.tilezero", nothing, [I8]),
        declared(builder, "llvm.x86.tileloadd64", nothing, [I8, byte, I64]),
        declared(builder, "llvm.x86.tilestored64", nothing, [I8, byte, I64]),
        declared(builder, "llvm.x86.tdpbf16ps", nothing, [I8, I8, I8]),
    )


def _sum_tiles(
    builder: Any, values: Any, row_tiles: int, blocks: int, first: int
) -> list[tuple[ir.Constant, Any]]:
    """Return the registers of the sums and pointers to their places in memory."""
    starts = spaced(builder, values[5], builder.mul(values[6], const(AMX_ROWS)), row_tiles)
    places = [
        place
        for start in starts
        for place in spaced(builder, start, const(BLOCK_BYTES), blocks, first)
    ]
    return [(_register(k), pointer(builder, place, I8)) for k, place in enumerate(places)]


@intrinsic
def configure_tiles(typingctx, address):
    """Set the tile registers' shapes from the 64 bytes of `tile_config` at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        load = declared(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [I8.as_pointer()])
        builder.call(load, [pointer(builder, values[0], I8)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release_tiles(typingctx):
    """Release the tile registers, so that the system does not save them."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.call(declared(builder, "llvm.x86.tilerelease", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), codegen


def tile_config() -> bytes:
    """Return the configuration of eight tiles of 16 rows and 64 bytes."""
    return bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[AMX_ROWS] * 8, *[0] * 8])
