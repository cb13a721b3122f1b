"""A product of packed weights with any number of rows of inputs, for one kind of processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit

from paceline.models.compiled.tiles import AMX_ROWS, make_amx_slab, slab_for

if TYPE_CHECKING:
    from collections.abc import Callable


def make_product(kernels: str, weights: str) -> Callable[..., Any]:
    """Return product(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows).

    It computes the group of 64 outputs at address w: float32 sums [rows, 64] at `out`, beginning with
    what is there unless `fresh`. Strides are bytes. With AMX, inputs and sums have room for whole
    tiles of 16 rows. kernels: see `processor`; weights: `bfloat16`, `float32` or `int8`.
    """
    if kernels == "amx" and weights == "bfloat16":
        return _amx_product()
    slab, most = slab_for(kernels, weights)

    @njit(error_model="numpy")
    def product(w, block_stride, x, x_stride, words, out, out_stride, fresh, rows):
        slabs = (rows + most - 1) // most
        done = 0
        for k in range(slabs):
            left = slabs - k
            count = (rows - done + left - 1) // left
            at, to = x + done * x_stride, out + done * out_stride
            slab(w, block_stride, at, x_stride, words, to, out_stride, fresh, count)
            done += count

    return product


def _amx_product() -> Callable[..., Any]:
    one, two = make_amx_slab(1), make_amx_slab(2)

    @njit(error_model="numpy")
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
