"""The inner products of int8 weights with int8 inputs, emitted for one kind of processor.

Packed as in `tiles.py`, with words of four inputs. A row of inputs holds its bytes, then a float32 scale
and an int32 sum for each group of 32. Integer sums in a group are exact, so only the order of the groups
matters to the float32 sums, and it is the same for every number of rows.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir

from paceline.models.compiled.tiles import (
    BLOCK_BYTES,
    Grid,
    TilesBySize,
    TileShape,
    enter,
    fetch_ahead,
    spaced,
    store_sums,
    sum_phis,
    sum_places,
    zeros,
)
from paceline.models.compiled.vectors import (
    F32,
    I32,
    I64,
    LANES,
    V16F,
    V16I,
    broadcast,
    const,
    declared,
    fused,
    load_value,
)

INT8_GROUP: Final = 8  # words of inputs, 32 numbers, that share a scale
# a sum takes two registers
WIDE_INT8: Final = TilesBySize(TileShape(3, 4), TileShape(12, 1))
NARROW_INT8: Final = TilesBySize(TileShape(1, 2), TileShape(3, 1))
_EXCESS: Final = 128  # weights are stored as unsigned bytes, this much larger


def dot_vnni(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Add the products of four unsigned weights and signed inputs with the processor's instruction."""
    dot = declared(builder, "llvm.x86.avx512.vpdpbusd.512", V16I, [V16I] * 3)
    return builder.call(dot, [sums, weights, broadcast(builder, word, V16I)])


def widened_int8(builder: Any, sums: Any, weights: Any, word: Any) -> Any:
    """Add the same products one by one, which gives the same integers."""
    for k in range(4):
        shift = ir.Constant(V16I, [8 * k] * LANES)
        weight = builder.and_(builder.lshr(weights, shift), ir.Constant(V16I, [255] * LANES))
        number = builder.ashr(builder.shl(word, ir.Constant(I32, 24 - 8 * k)), ir.Constant(I32, 24))
        sums = builder.add(sums, builder.mul(weight, broadcast(builder, number, V16I)))
    return sums


def emit_int8_tile(step: Any, builder: Any, values: Any, rows: int, blocks: int) -> None:
    """Emit the loop over groups of inputs; arguments as in `emit_tile`, but sums start at zero."""
    weights, block_stride, x, x_stride, words, *_ = values
    places = sum_places(builder, values, rows, blocks)
    w_at = spaced(builder, weights, block_stride, blocks)
    x_at = spaced(builder, x, x_stride, rows)
    groups = builder.sdiv(words, const(INT8_GROUP))
    to_scales = builder.mul(words, const(4))  # bytes from a row's begin
    to_sums = builder.add(to_scales, builder.mul(groups, const(4)))
    begin, loop = builder.block, builder.append_basic_block("groups")
    done = builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    group, totals = builder.phi(I64), sum_phis(builder, rows, blocks)
    group.add_incoming(const(0), begin)
    enter(totals, zeros(rows, blocks), begin)
    at = builder.mul(group, const(4))
    parts = []
    for row in x_at:
        of_group = load_value(builder, builder.add(builder.add(row, to_sums), at), I32, 4)
        start = builder.mul(of_group, ir.Constant(I32, -_EXCESS))
        parts.append([broadcast(builder, start, V16I)] * blocks)
    parts = _sum_group(step, builder, values, group, w_at, x_at, parts)
    new = []
    for row, sums, total_row in zip(x_at, parts, totals, strict=True):
        scale = load_value(builder, builder.add(builder.add(row, to_scales), at), F32, 4)
        factor = broadcast(builder, scale, V16F)
        whole = [builder.sitofp(part, V16F) for part in sums]
        new.append(
            [fused(builder, w, factor, total) for w, total in zip(whole, total_row, strict=True)]
        )
    following = builder.add(group, const(1))
    group.add_incoming(following, builder.block)
    enter(totals, new, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, groups), loop, done)
    builder.position_at_end(done)
    store_sums(builder, places, new)


def _sum_group(
    step: Any,
    builder: Any,
    values: Any,
    group: Any,
    w_at: list[Any],
    x_at: list[Any],
    parts: Grid,
) -> Grid:
    """Return the integer sums after one group. parts: those before it."""
    for word in range(INT8_GROUP):
        offset = builder.add(builder.mul(group, const(INT8_GROUP)), const(word))
        w_offset, x_offset = builder.mul(offset, const(BLOCK_BYTES)), builder.mul(offset, const(4))
        loaded = [load_value(builder, builder.add(w, w_offset), V16I, 64) for w in w_at]
        fetch_ahead(builder, values, len(w_at), offset)
        for r, row in enumerate(x_at):
            number = load_value(builder, builder.add(row, x_offset), I32, 4)
            parts[r] = [
                step(builder, part, w, number) for part, w in zip(parts[r], loaded, strict=True)
            ]
    return parts
