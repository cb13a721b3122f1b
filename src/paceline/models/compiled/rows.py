"""Operations on single rows of numbers: norms, activations, rounding to the inputs of a product.

`make_rows` returns them for one kind of inputs; numba compiles them into the forward. Row lengths are
multiples of 32. Symbols: d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from paceline.models.compiled.memory import (
    get_bf16,
    get_f32,
    load,
    load_bf16,
    put_f32,
    put_int32,
    store,
    store_bf16,
    store_int8,
    store_widened,
)
from paceline.models.compiled.vectors import (
    compiled,
    exp,
    fma,
    fma_one,
    larger,
    max_lanes,
    nearest,
    smaller,
    splat,
    sum_lanes,
)

if TYPE_CHECKING:
    from collections.abc import Callable


# bytes of 32 inputs in a row, by their kind; of int8 with their scale and sum
BYTES_OF_32: Final = {"bfloat16": 64, "widened": 128, "float32": 128, "int8": 40}


def inputs_of(kernels: str, weights: str) -> str:
    """Return the kind of inputs that a product takes: that of its weights, or `widened`.

    Widened inputs are bfloat16 numbers held as float32, since a processor without products of bfloat16
    reads them faster. kernels: see `processor`.
    """
    is_widened = weights == "bfloat16" and kernels in ("avx512", "generic")
    return "widened" if is_widened else weights


class Rows(NamedTuple):
    """The row operations for one kind of inputs, compiled by numba.

    row_bytes(room): the bytes of a row of `room` inputs. put_inputs(row, room, column, first, second):
    round 32 numbers into a row. norm_to_inputs(x, weight, target, size, room, eps): root-mean-square
    norm of a row.
    """

    row_bytes: Callable[..., Any]
    put_inputs: Callable[..., Any]
    norm_to_inputs: Callable[..., Any]


@compiled
def inverse_norm(x, size, room, eps):
    """Return 1 / sqrt(mean(x^2) + eps) of `size` float32 numbers; zeros follow up to `room`."""
    total, other = splat(np.float32(0)), splat(np.float32(0))
    for at in range(0, room, 32):
        first, second = load(x + 4 * at), load(x + 4 * at + 64)
        total, other = fma(first, first, total), fma(second, second, other)
    mean = sum_lanes(total + other) / np.float32(size)
    return np.float32(1) / np.sqrt(mean + eps)


@compiled
def norm_in_place(x, weight, size, room, eps):
    """Norm a row of float32 numbers in place."""
    scale = splat(inverse_norm(x, size, room, eps))
    for at in range(0, room, 16):
        store(x + 4 * at, load(x + 4 * at) * scale * load(weight + 4 * at))


@compiled
def add_normed(stream, x, weight, size, room, eps, factor):
    """Add `factor` times the norm of a row to the residual stream."""
    scale, times = splat(inverse_norm(x, size, room, eps)), splat(factor)
    for at in range(0, room, 16):
        normed = load(x + 4 * at) * scale * load(weight + 4 * at)
        store(stream + 4 * at, fma(normed, times, load(stream + 4 * at)))


@compiled
def turn(x, angles, half):
    """Rotate the pairs (i, i + half) of a row in place. angles: cosines [half], then sines."""
    whole = half // 16 * 16
    for at in range(0, whole, 16):
        a, b = load(x + 4 * at), load(x + 4 * (half + at))
        cos, sin = load(angles + 4 * at), load(angles + 4 * (half + at))
        store(x + 4 * at, fma(a, cos, splat(np.float32(0)) - b * sin))
        store(x + 4 * (half + at), fma(b, cos, a * sin))
    for at in range(whole, half):
        one, two = get_f32(x + 4 * at), get_f32(x + 4 * (half + at))
        c, s = get_f32(angles + 4 * at), get_f32(angles + 4 * (half + at))
        put_f32(x + 4 * at, fma_one(one, c, -(two * s)))
        put_f32(x + 4 * (half + at), fma_one(two, c, one * s))


@compiled
def tanh(x):
    """Return the hyperbolic tangent of each lane, as 1 - 2 / (e^2x + 1)."""
    one = splat(np.float32(1))
    bounded = smaller(larger(x, splat(np.float32(-20))), splat(np.float32(20)))
    bounded = bounded + (x - x)  # nan stays nan
    return one - splat(np.float32(2)) / (exp(bounded + bounded) + one)


@compiled
def erf(x):
    """Return the error function of each lane within 2e-7 (Abramowitz and Stegun 7.1.26)."""
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    size = larger(x, zero - x)
    t = one / fma(size, splat(np.float32(0.3275911)), one)
    poly = splat(np.float32(1.061405429))
    poly = fma(poly, t, splat(np.float32(-1.453152027)))
    poly = fma(poly, t, splat(np.float32(1.421413741)))
    poly = fma(poly, t, splat(np.float32(-0.284496736)))
    poly = fma(poly, t, splat(np.float32(0.254829592)))
    upper = one - poly * t * exp(zero - size * size)
    return upper * x / larger(size, splat(np.float32(1e-30)))


@compiled
def activate(x, kind):
    """Return silu (kind 0), tanh gelu (1), erf gelu (2) or relu (3) of each lane."""
    one, half = splat(np.float32(1)), splat(np.float32(0.5))
    if kind == 0:
        return x / (one + exp(splat(np.float32(0)) - x))
    if kind == 1:
        inner = fma(x * x * x, splat(np.float32(0.044715)), x)
        return half * x * (one + tanh(inner * splat(np.float32(0.7978845608028654))))
    if kind == 3:
        return larger(splat(np.float32(0)), x)  # nan stays nan
    return half * x * (one + erf(x * splat(np.float32(0.7071067811865476))))


def make_rows(kind: str) -> Rows:
    """Return the row operations for inputs of `bfloat16`, `widened`, `float32` or `int8`.

    A row of int8 holds its bytes, then a float32 scale and an int32 sum for each 32 of them.
    """
    bytes_of_32 = BYTES_OF_32[kind]

    @compiled
    def row_bytes(room):
        return room // 32 * bytes_of_32

    if kind == "bfloat16":

        @compiled
        def put_inputs(row, room, column, first, second):
            store_bf16(row + 2 * column, first)
            store_bf16(row + 2 * column + 32, second)

    elif kind == "widened":

        @compiled
        def put_inputs(row, room, column, first, second):
            store_widened(row + 4 * column, first)
            store_widened(row + 4 * column + 64, second)

    elif kind == "float32":

        @compiled
        def put_inputs(row, room, column, first, second):
            store(row + 4 * column, first)
            store(row + 4 * column + 64, second)

    else:
        put_inputs = _put_int8

    @compiled
    def norm_to_inputs(x, weight, target, size, room, eps):
        scale = splat(inverse_norm(x, size, room, eps))
        for at in range(0, room, 32):
            first = load(x + 4 * at) * scale * load(weight + 4 * at)
            second = load(x + 4 * at + 64) * scale * load(weight + 4 * at + 64)
            put_inputs(target, room, at, first, second)

    return Rows(row_bytes, put_inputs, norm_to_inputs)


@compiled
def _put_int8(row, room, column, first, second):
    zero, none = splat(np.float32(0)), np.float32(0)
    largest = max_lanes(larger(larger(first, zero - first), larger(second, zero - second)))
    total = sum_lanes(first + second)
    scale = largest / np.float32(127) + (total - total)  # not finite if a number is not
    inverse = np.float32(127) / largest if largest > none else none
    one, two = nearest(first * splat(inverse)), nearest(second * splat(inverse))
    store_int8(row + column, one)
    store_int8(row + column + 16, two)
    scales = row + room + 4 * (column // 32)
    put_f32(scales, scale)
    put_int32(scales + 4 * (room // 32), sum_lanes(one + two))


def make_embed(half: bool) -> Callable[..., Any]:
    """Return embed(source, target, size, room, scale), which reads a row of the embedding as float32.

    half: whether the embedding is bfloat16.
    """

    @compiled
    def embed(source, target, size, room, scale):
        factor, whole = splat(scale), size // 16 * 16
        for at in range(0, whole, 16):
            numbers = load_bf16(source + 2 * at) if half else load(source + 4 * at)
            store(target + 4 * at, numbers * factor)
        for at in range(whole, size):
            number = get_bf16(source + 2 * at) if half else get_f32(source + 4 * at)
            put_f32(target + 4 * at, number * scale)
        for at in range(size, room):
            put_f32(target + 4 * at, np.float32(0))

    return embed
