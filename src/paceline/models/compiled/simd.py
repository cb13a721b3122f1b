"""Vectors of 16 float32 numbers, raw memory and atomics, for functions that numba compiles.

Every operation is written out, so that its result does not depend on what a compiler's vectoriser
makes of a loop, and the bits of a sum do not depend on a buffer's place or length. Memory is addressed
by int64 addresses in bytes. LLVM splits the vectors on processors whose registers are narrower.
"""

from __future__ import annotations

import operator
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES: Final = 16
VECTOR_BYTES: Final = 64

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32: Final = ir.FloatType()
V16F: Final = ir.VectorType(F32, LANES)
V16I: Final = ir.VectorType(I32, LANES)
V16H: Final = ir.VectorType(I16, LANES)


class BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


V32B: Final = ir.VectorType(BFloat(), 2 * LANES)


class Floats(types.Type):  # type: ignore[misc]
    """The numba type of a vector of 16 float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="Floats16")


FLOATS: Final = Floats()


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, V16F)


# --- building blocks of the intrinsics ------------------------------------------------------------


def const(value: int) -> ir.Constant:
    """Return an int64 constant."""
    return ir.Constant(I64, value)


def splat_constant(value: float) -> ir.Constant:
    """Return 16 lanes of one float32."""
    return ir.Constant(V16F, [value] * LANES)


def declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Return a function of the module, declared once."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """Return an address as a pointer to `kind`."""
    return builder.inttoptr(address, kind.as_pointer())


def load_value(builder: Any, address: Any, kind: Any, align: int) -> Any:
    """Load a value of LLVM's type `kind`."""
    value = builder.load(pointer(builder, address, kind))
    value.align = align
    return value


def store_value(builder: Any, address: Any, value: Any, align: int) -> None:
    """Store a value of LLVM's."""
    builder.store(value, pointer(builder, address, value.type)).align = align


def broadcast(builder: Any, scalar: Any, kind: Any) -> Any:
    """Return a vector of LLVM's type `kind` with a scalar in all lanes."""
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, undefined, zeros)


def _define(result: Any, *arguments: Any) -> Any:
    """Turn emit(builder, *values) into a numba intrinsic of fixed types."""

    def decorate(emit: Any) -> Any:
        names = [f"a{i}" for i in range(len(arguments))]
        source = (
            f"def {emit.__name__}(typingctx{''.join(', ' + n for n in names)}):\n"
            "    def codegen(context, builder, signature, values):\n"
            "        found = emit_values(builder, *values)\n"
            "        return context.get_dummy_value() if found is None else found\n"
            "    return result(*arguments), codegen\n"
        )
        space: dict[str, Any] = {"emit_values": emit, "result": result, "arguments": arguments}
        exec(source, space)
        function = space[emit.__name__]
        function.__doc__ = emit.__doc__
        return intrinsic(function)

    return decorate


# --- memory ---------------------------------------------------------------------------------------

_NONE, _INT, _FLOAT = types.void, types.int64, types.float32


@_define(FLOATS, _INT)
def load(builder: Any, address: Any) -> Any:
    """Load 16 float32 numbers."""
    return load_value(builder, address, V16F, 4)


@_define(_NONE, _INT, FLOATS)
def store(builder: Any, address: Any, value: Any) -> None:
    """Store 16 float32 numbers."""
    store_value(builder, address, value, 4)


@_define(FLOATS, _INT)
def load_bf16(builder: Any, address: Any) -> Any:
    """Load 16 bfloat16 numbers."""
    wide = builder.zext(load_value(builder, address, V16H, 2), V16I)
    shifted = builder.shl(wide, ir.Constant(V16I, [16] * LANES))
    return builder.bitcast(shifted, V16F)


@_define(_NONE, _INT, FLOATS)
def store_bf16(builder: Any, address: Any, value: Any) -> None:
    """Store 16 numbers rounded to the nearest bfloat16, ties to even."""
    store_value(builder, address, builder.trunc(_rounded_up(builder, value, V16I), V16H), 2)


def _rounded_up(builder: Any, value: Any, kind: Any) -> Any:
    """Return the bits of a bfloat16 in the low half of each lane."""
    whole = kind if not isinstance(kind, ir.VectorType) else None

    def number(n: int) -> ir.Constant:
        return ir.Constant(I32, n) if whole is not None else ir.Constant(V16I, [n] * LANES)

    bits = builder.bitcast(value, kind)
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    return builder.lshr(builder.add(builder.add(bits, number(0x7FFF)), odd), number(16))


@_define(_NONE, _INT, FLOATS)
def store_int8(builder: Any, address: Any, value: Any) -> None:
    """Store 16 numbers rounded to the nearest integer, between -127 and 127."""
    whole = builder.fptosi(_nearest(builder, value), V16I)
    store_value(builder, address, builder.trunc(whole, ir.VectorType(I8, LANES)), 1)


@_define(FLOATS, FLOATS)
def nearest(builder: Any, value: Any) -> Any:
    """Return each number rounded to the nearest integer, ties to even."""
    return _nearest(builder, value)


def _nearest(builder: Any, value: Any) -> Any:
    return builder.call(declared(builder, "llvm.rint.v16f32", V16F, [V16F]), [value])


@_define(_NONE, _INT, _FLOAT)
def put_int32(builder: Any, address: Any, value: Any) -> None:
    """Store a whole number as int32."""
    store_value(builder, address, builder.fptosi(value, I32), 4)


@_define(_NONE, _INT, _FLOAT)
def put_bf16(builder: Any, address: Any, value: Any) -> None:
    """Store one number rounded to bfloat16."""
    store_value(builder, address, builder.trunc(_rounded_up(builder, value, I32), I16), 2)


@_define(_FLOAT, _INT)
def get_bf16(builder: Any, address: Any) -> Any:
    """Load one bfloat16."""
    wide = builder.zext(load_value(builder, address, I16, 2), I32)
    return builder.bitcast(builder.shl(wide, ir.Constant(I32, 16)), F32)


@_define(_FLOAT, _INT)
def get_f32(builder: Any, address: Any) -> Any:
    """Load one float32."""
    return load_value(builder, address, F32, 4)


@_define(_NONE, _INT, _FLOAT)
def put_f32(builder: Any, address: Any, value: Any) -> None:
    """Store one float32."""
    store_value(builder, address, value, 4)


@_define(_INT, _INT)
def get_int(builder: Any, address: Any) -> Any:
    """Load one int64."""
    return load_value(builder, address, I64, 8)


@_define(_NONE, _INT, _INT)
def put_int(builder: Any, address: Any, value: Any) -> None:
    """Store one int64."""
    store_value(builder, address, value, 8)


@_define(_INT, _INT, _INT)
def field(builder: Any, table: Any, place: Any) -> Any:
    """Return the int64 at a place of a table."""
    return load_value(builder, builder.add(table, builder.shl(place, const(3))), I64, 8)


@_define(_FLOAT, _INT, _INT)
def float_field(builder: Any, table: Any, place: Any) -> Any:
    """Return the float32 in the lower half of a place of a table."""
    return load_value(builder, builder.add(table, builder.shl(place, const(3))), F32, 8)


@_define(_NONE, _INT, _INT, _INT)
def put_field(builder: Any, table: Any, place: Any, value: Any) -> None:
    """Store an int64 at a place of a table."""
    store_value(builder, builder.add(table, builder.shl(place, const(3))), value, 8)


@_define(_NONE, _INT, _INT)
def copy_word(builder: Any, target: Any, source: Any) -> None:
    """Copy four bytes."""
    store_value(builder, target, load_value(builder, source, I32, 4), 4)


@_define(_NONE, _INT, _INT)
def copy_half(builder: Any, target: Any, source: Any) -> None:
    """Copy two bytes."""
    store_value(builder, target, load_value(builder, source, I16, 2), 2)


@_define(_NONE, _INT)
def zero_word(builder: Any, target: Any) -> None:
    """Write four zero bytes."""
    store_value(builder, target, ir.Constant(I32, 0), 4)


# --- arithmetic -----------------------------------------------------------------------------------


def _binary(name: str) -> Any:
    @_define(FLOATS, FLOATS, FLOATS)
    def emit(builder: Any, a: Any, b: Any) -> Any:
        return getattr(builder, name)(a, b)

    return emit


_add, _subtract, _multiply, _divide = map(_binary, ("fadd", "fsub", "fmul", "fdiv"))


def _overloaded(operation: Any, function: Any) -> None:
    @overload(operation)
    def typed(a, b):  # numba compares signatures with annotations
        if isinstance(a, Floats) and isinstance(b, Floats):
            return lambda a, b: function(a, b)
        return None


for _operation, _function in (
    (operator.add, _add),
    (operator.sub, _subtract),
    (operator.mul, _multiply),
    (operator.truediv, _divide),
):
    _overloaded(_operation, _function)


@_define(FLOATS, _FLOAT)
def splat(builder: Any, value: Any) -> Any:
    """Return 16 lanes of one number."""
    return broadcast(builder, value, V16F)


@_define(FLOATS, FLOATS, FLOATS, FLOATS)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    return builder.call(declared(builder, "llvm.fma.v16f32", V16F, [V16F] * 3), [a, b, c])


@_define(_FLOAT, _FLOAT, _FLOAT, _FLOAT)
def fma_one(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of single numbers, rounded once."""
    return builder.call(declared(builder, "llvm.fma.f32", F32, [F32] * 3), [a, b, c])


@_define(FLOATS, FLOATS, FLOATS)
def larger(builder: Any, a: Any, b: Any) -> Any:
    """Return the larger number of each lane; b where one is nan."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_define(FLOATS, FLOATS, FLOATS)
def smaller(builder: Any, a: Any, b: Any) -> Any:
    """Return the smaller number of each lane; b where one is nan."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@_define(_FLOAT, FLOATS, _INT)
def lane(builder: Any, a: Any, index: Any) -> Any:
    """Return the number of one lane."""
    return builder.extract_element(a, builder.trunc(index, I32))


def _halved(builder: Any, vector: Any, combine: Any) -> Any:
    """Combine 16 lanes in a tree of fixed order."""
    width = LANES
    undefined = ir.Constant(V16F, ir.Undefined)
    while width > 1:
        width //= 2
        order = [width + i if i < width else i for i in range(LANES)]
        mask = ir.Constant(V16I, order)
        vector = combine(vector, builder.shuffle_vector(vector, undefined, mask))
    return builder.extract_element(vector, ir.Constant(I32, 0))


@_define(_FLOAT, FLOATS)
def sum_lanes(builder: Any, a: Any) -> Any:
    """Return the sum of the lanes, in a fixed order."""
    return _halved(builder, a, builder.fadd)


@_define(_FLOAT, FLOATS)
def max_lanes(builder: Any, a: Any) -> Any:
    """Return the largest lane."""
    return _halved(builder, a, lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


@_define(types.boolean, FLOATS)
def has_nan(builder: Any, a: Any) -> Any:
    """Return whether any lane is nan."""
    flags = builder.bitcast(builder.fcmp_unordered("uno", a, a), ir.IntType(LANES))
    return builder.icmp_unsigned("!=", flags, ir.Constant(ir.IntType(LANES), 0))


@_define(_INT, FLOATS, FLOATS)
def lanes_equal(builder: Any, a: Any, b: Any) -> Any:
    """Return a bit for each lane that is equal in both."""
    flags = builder.bitcast(builder.fcmp_ordered("==", a, b), ir.IntType(LANES))
    return builder.zext(flags, I64)


@_define(_INT, _INT)
def first_bit(builder: Any, bits: Any) -> Any:
    """Return the number of the lowest set bit."""
    count = declared(builder, "llvm.cttz.i64", I64, [I64, ir.IntType(1)])
    return builder.call(count, [bits, ir.Constant(ir.IntType(1), 0)])


@_define(FLOATS, FLOATS, _INT, _INT)
def keep_lanes(builder: Any, a: Any, start: Any, stop: Any) -> Any:
    """Return a in lanes start to stop - 1, and -1e30 in the others; bounds may lie outside."""
    numbers = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
    wide = ir.VectorType(I64, LANES)
    above = builder.icmp_signed(">=", numbers, broadcast(builder, start, wide))
    below = builder.icmp_signed("<", numbers, broadcast(builder, stop, wide))
    return builder.select(builder.and_(above, below), a, splat_constant(-1e30))


# e^x = 2^n e^r with |r| <= ln(2)/2, and a Taylor polynomial for e^r
_LOG2E: Final = 1.4426950408889634
_LN2_HIGH: Final = 0.693145751953125
_LN2_LOW: Final = 1.428606765330187e-06
_TAYLOR: Final = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_SMALLEST: Final = -87.0


@_define(FLOATS, FLOATS)
def exp(builder: Any, x: Any) -> Any:
    """Return e^x within 2 units in the last place, and 0 below -87; x at most 88."""
    fused = declared(builder, "llvm.fma.v16f32", V16F, [V16F] * 3)
    nearest = declared(builder, "llvm.rint.v16f32", V16F, [V16F])
    too_small = builder.fcmp_ordered("<", x, splat_constant(_SMALLEST))
    below = builder.fcmp_ordered(">", x, splat_constant(88.0))
    x = builder.select(too_small, splat_constant(_SMALLEST), x)
    x = builder.select(below, splat_constant(88.0), x)
    n = builder.call(nearest, [builder.fmul(x, splat_constant(_LOG2E))])
    r = builder.call(fused, [n, splat_constant(-_LN2_HIGH), x])
    r = builder.call(fused, [n, splat_constant(-_LN2_LOW), r])
    total = splat_constant(_TAYLOR[0])
    for term in _TAYLOR[1:]:
        total = builder.call(fused, [total, r, splat_constant(term)])
    shifted = builder.shl(builder.fptosi(n, V16I), ir.Constant(V16I, [23] * LANES))
    scaled = builder.bitcast(builder.add(builder.bitcast(total, V16I), shifted), V16F)
    return builder.select(too_small, splat_constant(0.0), scaled)


# --- threads --------------------------------------------------------------------------------------


@_define(_INT, _INT)
def get_atomic(builder: Any, address: Any) -> Any:
    """Load an int64 that other threads write; later reads are not moved before it."""
    return builder.load_atomic(pointer(builder, address, I64), "acquire", 8)


@_define(_NONE, _INT, _INT)
def put_atomic(builder: Any, address: Any, value: Any) -> None:
    """Store an int64 that other threads read; earlier writes are not moved after it."""
    builder.store_atomic(value, pointer(builder, address, I64), "release", 8)


@_define(_INT, _INT, _INT)
def add_atomic(builder: Any, address: Any, value: Any) -> Any:
    """Add to an int64 that other threads change, and return what it was before."""
    return builder.atomic_rmw("add", pointer(builder, address, I64), value, "acq_rel")


@_define(_INT, _INT, _INT, _INT)
def swap_atomic(builder: Any, address: Any, expected: Any, value: Any) -> Any:
    """Replace an int64 if it is the expected one, and return what it was."""
    found = builder.cmpxchg(pointer(builder, address, I64), expected, value, "acq_rel", "acquire")
    return builder.extract_value(found, 0)


@_define(_NONE, _INT, _INT, _INT, _INT)
def call_run(builder: Any, function: Any, job: Any, thread: Any, tag: Any) -> None:
    """Call a function of three int64 at an address."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
    builder.call(builder.inttoptr(function, kind.as_pointer()), [job, thread, tag])
