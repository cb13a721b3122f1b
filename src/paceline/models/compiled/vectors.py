"""Vectors of 16 float32 numbers and their arithmetic, for functions that numba compiles.

Every operation is written out, so that its result does not depend on what a compiler's vectoriser
makes of a loop. LLVM splits the vectors on processors whose registers are narrower. Also the parts of
which intrinsics are made: types, constants and `define`.
"""

from __future__ import annotations

import operator
from typing import Any, Final

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

LANES: Final = 16

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
FLAGS: Final = ir.IntType(LANES)  # a bit per lane


class Floats(types.Type):  # type: ignore[misc]
    """The numba type of a vector of 16 float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="Floats16")


FLOATS: Final = Floats()
NONE, INT, FLOAT = types.void, types.int64, types.float32

compiled = njit(error_model="numpy")  # a division by zero raises nothing


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, V16F)


# --- parts of intrinsics --------------------------------------------------------------------------


def const(value: int) -> ir.Constant:
    """Return an int64 constant."""
    return ir.Constant(I64, value)


def splat_constant(value: float) -> ir.Constant:
    """Return a constant vector of 16 times one float32."""
    return ir.Constant(V16F, [value] * LANES)


def declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Return the function `name` of LLVM or the processor, declared once per module."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """Return an address in bytes as a pointer to LLVM's type `kind`."""
    return builder.inttoptr(address, kind.as_pointer())


def load_value(builder: Any, address: Any, kind: Any, align: int) -> Any:
    """Load a value of LLVM's type `kind`. align: bytes of which the address is a multiple."""
    value = builder.load(pointer(builder, address, kind))
    value.align = align
    return value


def store_value(builder: Any, address: Any, value: Any, align: int) -> None:
    """Store a value of any of LLVM's types. align: as for `load_value`."""
    builder.store(value, pointer(builder, address, value.type)).align = align


def broadcast(builder: Any, scalar: Any, kind: Any) -> Any:
    """Return a vector of LLVM's type `kind` with a scalar in all lanes."""
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, undefined, zeros)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of 16 lanes, rounded once."""
    return builder.call(declared(builder, "llvm.fma.v16f32", V16F, [V16F] * 3), [a, b, c])


def rounded_lanes(builder: Any, value: Any) -> Any:
    """Return each of 16 lanes rounded to the nearest integer, ties to even."""
    return builder.call(declared(builder, "llvm.rint.v16f32", V16F, [V16F]), [value])


def define(result: Any, *arguments: Any) -> Any:
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


# --- arithmetic -----------------------------------------------------------------------------------


def _binary(name: str) -> Any:
    @define(FLOATS, FLOATS, FLOATS)
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


@define(FLOATS, FLOAT)
def splat(builder: Any, value: Any) -> Any:
    """Return 16 lanes of one number."""
    return broadcast(builder, value, V16F)


@define(FLOATS, FLOATS, FLOATS, FLOATS)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    return fused(builder, a, b, c)


@define(FLOAT, FLOAT, FLOAT, FLOAT)
def fma_one(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of single numbers, rounded once."""
    return builder.call(declared(builder, "llvm.fma.f32", F32, [F32] * 3), [a, b, c])


@define(FLOATS, FLOATS)
def nearest(builder: Any, value: Any) -> Any:
    """Return each number rounded to the nearest integer, ties to even."""
    return rounded_lanes(builder, value)


@define(FLOATS, FLOATS, FLOATS)
def larger(builder: Any, a: Any, b: Any) -> Any:
    """Return the larger number of each lane; b where one is nan."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@define(FLOATS, FLOATS, FLOATS)
def smaller(builder: Any, a: Any, b: Any) -> Any:
    """Return the smaller number of each lane; b where one is nan."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


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


@define(FLOAT, FLOATS)
def sum_lanes(builder: Any, a: Any) -> Any:
    """Return the sum of the lanes, in a fixed order."""
    return _halved(builder, a, builder.fadd)


@define(FLOAT, FLOATS)
def max_lanes(builder: Any, a: Any) -> Any:
    """Return the largest lane."""
    return _halved(builder, a, lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


@define(types.boolean, FLOATS)
def has_nan(builder: Any, a: Any) -> Any:
    """Return whether any lane is nan."""
    flags = builder.bitcast(builder.fcmp_unordered("uno", a, a), FLAGS)
    return builder.icmp_unsigned("!=", flags, ir.Constant(FLAGS, 0))


@define(INT, FLOATS, FLOATS)
def lanes_equal(builder: Any, a: Any, b: Any) -> Any:
    """Return a bit for each lane that is equal in both."""
    flags = builder.bitcast(builder.fcmp_ordered("==", a, b), FLAGS)
    return builder.zext(flags, I64)


@define(INT, FLOAT)
def exponent(builder: Any, value: Any) -> Any:
    """Return the largest n with 2^n at most a positive number."""
    bits = builder.lshr(builder.bitcast(value, I32), ir.Constant(I32, 23))
    return builder.sub(builder.zext(bits, I64), const(127))


@define(INT, INT)
def first_bit(builder: Any, bits: Any) -> Any:
    """Return the number of the lowest set bit."""
    count = declared(builder, "llvm.cttz.i64", I64, [I64, ir.IntType(1)])
    return builder.call(count, [bits, ir.Constant(ir.IntType(1), 0)])


@define(FLOATS, FLOATS, INT, INT)
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
_LARGEST: Final = 88.0


@define(FLOATS, FLOATS)
def exp(builder: Any, x: Any) -> Any:
    """Return e^x within 2 units in the last place, and 0 below -87; x at most 88."""
    too_small = builder.fcmp_ordered("<", x, splat_constant(_SMALLEST))
    too_large = builder.fcmp_ordered(">", x, splat_constant(_LARGEST))
    x = builder.select(too_small, splat_constant(_SMALLEST), x)
    x = builder.select(too_large, splat_constant(_LARGEST), x)
    n = rounded_lanes(builder, builder.fmul(x, splat_constant(_LOG2E)))
    r = fused(builder, n, splat_constant(-_LN2_HIGH), x)
    r = fused(builder, n, splat_constant(-_LN2_LOW), r)
    total = splat_constant(_TAYLOR[0])
    for term in _TAYLOR[1:]:
        total = fused(builder, total, r, splat_constant(term))
    shifted = builder.shl(builder.fptosi(n, V16I), ir.Constant(V16I, [23] * LANES))
    scaled = builder.bitcast(builder.add(builder.bitcast(total, V16I), shifted), V16F)
    return builder.select(too_small, splat_constant(0.0), scaled)
