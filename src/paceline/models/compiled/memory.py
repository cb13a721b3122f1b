"""Loads, stores and atomics at int64 addresses in bytes, for functions that numba compiles.

A vector may lie at any multiple of its numbers' size, so the bits of a sum do not depend on a buffer's
place or length. A table is a sequence of int64, and a place is the index of one of them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from paceline.models.compiled.vectors import (
    F32,
    FLOAT,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INT,
    LANES,
    NONE,
    V16F,
    V16H,
    V16I,
    const,
    define,
    load_value,
    pointer,
    rounded_lanes,
    store_value,
)


@define(FLOATS, INT)
def load(builder: Any, address: Any) -> Any:
    """Load 16 float32 numbers."""
    return load_value(builder, address, V16F, 4)


@define(NONE, INT, FLOATS)
def store(builder: Any, address: Any, value: Any) -> None:
    """Store 16 float32 numbers."""
    store_value(builder, address, value, 4)


@define(FLOATS, INT)
def load_bf16(builder: Any, address: Any) -> Any:
    """Load 16 bfloat16 numbers as float32."""
    wide = builder.zext(load_value(builder, address, V16H, 2), V16I)
    shifted = builder.shl(wide, ir.Constant(V16I, [16] * LANES))
    return builder.bitcast(shifted, V16F)


@define(NONE, INT, FLOATS)
def store_bf16(builder: Any, address: Any, value: Any) -> None:
    """Store 16 numbers rounded to the nearest bfloat16, ties to even."""
    store_value(builder, address, builder.trunc(_bf16_bits(builder, value, V16I), V16H), 2)


@define(NONE, INT, FLOATS)
def store_widened(builder: Any, address: Any, value: Any) -> None:
    """Store 16 float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = builder.shl(_bf16_bits(builder, value, V16I), ir.Constant(V16I, [16] * LANES))
    store_value(builder, address, builder.bitcast(bits, V16F), 4)


def _bf16_bits(builder: Any, value: Any, kind: Any) -> Any:
    """Return the bits of the nearest bfloat16 in the low half of I32 or V16I."""

    def number(n: int) -> ir.Constant:
        return ir.Constant(kind, n if kind is I32 else [n] * LANES)

    bits = builder.bitcast(value, kind)
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    return builder.lshr(builder.add(builder.add(bits, number(0x7FFF)), odd), number(16))


@define(NONE, INT, FLOATS)
def store_int8(builder: Any, address: Any, value: Any) -> None:
    """Store 16 numbers rounded to the nearest integer, which lies between -127 and 127, as a byte."""
    whole = builder.fptosi(rounded_lanes(builder, value), V16I)
    store_value(builder, address, builder.trunc(whole, ir.VectorType(I8, LANES)), 1)


@define(NONE, INT, FLOAT)
def put_int32(builder: Any, address: Any, value: Any) -> None:
    """Store a whole float32 as int32."""
    store_value(builder, address, builder.fptosi(value, I32), 4)


@define(NONE, INT, FLOAT)
def put_bf16(builder: Any, address: Any, value: Any) -> None:
    """Store one number rounded to bfloat16."""
    store_value(builder, address, builder.trunc(_bf16_bits(builder, value, I32), I16), 2)


@define(FLOAT, INT)
def get_bf16(builder: Any, address: Any) -> Any:
    """Load one bfloat16 as float32."""
    wide = builder.zext(load_value(builder, address, I16, 2), I32)
    return builder.bitcast(builder.shl(wide, ir.Constant(I32, 16)), F32)


@define(FLOAT, INT)
def get_f32(builder: Any, address: Any) -> Any:
    """Load one float32."""
    return load_value(builder, address, F32, 4)


@define(NONE, INT, FLOAT)
def put_f32(builder: Any, address: Any, value: Any) -> None:
    """Store one float32."""
    store_value(builder, address, value, 4)


@define(INT, INT)
def get_int(builder: Any, address: Any) -> Any:
    """Load one int64."""
    return load_value(builder, address, I64, 8)


@define(NONE, INT, INT)
def put_int(builder: Any, address: Any, value: Any) -> None:
    """Store one int64."""
    store_value(builder, address, value, 8)


@define(INT, INT, INT)
def field(builder: Any, table: Any, place: Any) -> Any:
    """Return the int64 at a place of a table."""
    return load_value(builder, builder.add(table, builder.shl(place, const(3))), I64, 8)


@define(FLOAT, INT, INT)
def float_field(builder: Any, table: Any, place: Any) -> Any:
    """Return the float32 in the lower half of a place of a table."""
    return load_value(builder, builder.add(table, builder.shl(place, const(3))), F32, 8)


@define(NONE, INT, INT, INT)
def put_field(builder: Any, table: Any, place: Any, value: Any) -> None:
    """Store an int64 at a place of a table."""
    store_value(builder, builder.add(table, builder.shl(place, const(3))), value, 8)


@define(NONE, INT, INT)
def copy_word(builder: Any, target: Any, source: Any) -> None:
    """Copy four bytes."""
    store_value(builder, target, load_value(builder, source, I32, 4), 4)


@define(NONE, INT, INT)
def copy_half(builder: Any, target: Any, source: Any) -> None:
    """Copy two bytes."""
    store_value(builder, target, load_value(builder, source, I16, 2), 2)


# --- threads --------------------------------------------------------------------------------------


@define(INT, INT)
def get_atomic(builder: Any, address: Any) -> Any:
    """Load an int64 that other threads write; later reads are not moved before it."""
    return builder.load_atomic(pointer(builder, address, I64), "acquire", 8)


@define(NONE, INT, INT)
def put_atomic(builder: Any, address: Any, value: Any) -> None:
    """Store an int64 that other threads read; earlier writes are not moved after it."""
    builder.store_atomic(value, pointer(builder, address, I64), "release", 8)


@define(INT, INT, INT)
def add_atomic(builder: Any, address: Any, value: Any) -> Any:
    """Add to an int64 that other threads change, and return what it was before."""
    return builder.atomic_rmw("add", pointer(builder, address, I64), value, "acq_rel")


@define(INT, INT, INT, INT)
def swap_atomic(builder: Any, address: Any, expected: Any, value: Any) -> Any:
    """Replace an int64 if it is the expected one, and return what it was."""
    found = builder.cmpxchg(pointer(builder, address, I64), expected, value, "acq_rel", "acquire")
    return builder.extract_value(found, 0)


@define(NONE, INT, INT, INT, INT)
def call_run(builder: Any, function: Any, job: Any, thread: Any, tag: Any) -> None:
    """Call the machine code at address `function` with (job, thread, tag)."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
    builder.call(builder.inttoptr(function, kind.as_pointer()), [job, thread, tag])
