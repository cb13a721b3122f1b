"""Attention of packed tokens over a paged cache, as one Triton kernel and a small weighted sum after it.

A program takes one row's tokens for one key-value head, with all query heads that share it, so keys
and values are read once and never expanded. It reads the row's blocks through the table: those cached
before need no mask; the last ones hold the row's new tokens, of which a token sees those in its ancestor
bits. If rows and heads are too few to fill the device, the blocks are split among programs and their
sums are weighted and added (flash-decoding). Sums are in float32.

Symbols: R rows, T packed tokens, W tokens per row, H query heads, Hkv key-value heads, G = H / Hkv,
D head size, S splits, M = G * W queries of a program, in tiles of BLOCK_M.
"""

from __future__ import annotations

from functools import cache as cached
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from paceline.models.cuda.layout import BLOCK as _BLOCK

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.cuda.layout import PackedRows

_MOST_SPLITS: Final = 32
_MOST_QUERIES: Final = 64  # of a program
# numbers that vary between forwards; Triton would compile a kernel for each kind of value
_VARYING: Final = ["num_tokens", "num_words", "num_splits", "table_stride", "bias_stride"]
# adjacent views of one vector, so their alignment varies
_PARTS: Final = ["firsts", "widths", "starts", "slots", "positions", "bits"]


def attend_blocks(
    query: Tensor,
    pool: Tensor,
    rows: PackedRows,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    num_splits: int | None = None,
    biases: Tensor | None = None,
) -> Tensor:
    """Return outputs [T, H, D] of queries [T, H, D] whose keys and values are in the pool already.

    pool: [places, 2 * Hkv, D]. scale, window, cap: as in `interfaces.Batch`. num_splits: S, None
    chooses by the device's size. biases: [H, L] float32, added to the scores by key position, L
    greater than any position. The output of padding tokens is undefined.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = pool.shape[1] // 2
    groups = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    queries = groups * rows.max_width
    # wide heads leave registers for fewer queries
    most = _MOST_QUERIES if block_d * query.element_size() <= 256 else _MOST_QUERIES // 2
    block_m = min(most, max(16, triton.next_power_of_2(queries)))
    grid = len(rows.width) * num_kv_heads, triton.cdiv(queries, block_m)
    if num_splits is None:
        # a batch's rows are not all as wide as the widest may be
        rows_or_tiles = max(len(rows.width), triton.cdiv(groups * num_tokens, block_m))
        busy = num_kv_heads * rows_or_tiles
        num_splits = _choose_splits(busy, rows.max_length, query.device)
    out = query.new_empty((num_tokens, num_heads, head_dim))
    sums, weights = out, out  # unused without splits
    if num_splits > 1:
        sums = query.new_empty((num_splits, *out.shape), dtype=torch.float32)
        weights = query.new_empty((num_splits, num_tokens, num_heads, 2), dtype=torch.float32)
    table = rows.table
    # words of half the width take half the registers
    bits = None if rows.bits is None else rows.bits.view(torch.int32)
    _attend[(*grid, num_splits)](
        query,
        pool,
        table,
        rows.first,
        rows.width,
        rows.start,
        rows.slot,
        rows.position,
        rows.position if bits is None else bits,
        query if biases is None else biases,
        sums,
        weights,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        num_tokens,
        0 if bits is None else bits.shape[1],
        num_splits,
        0 if biases is None else biases.stride(0),
        scale,
        0.0 if cap is None else cap,
        NUM_KV_HEADS=num_kv_heads,
        GROUPS=groups,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK=_BLOCK,
        WINDOW=window or 0,
        CAPPED=cap is not None,
        HAS_BITS=bits is not None,
        HAS_BIASES=biases is not None,
        IS_SPLIT=num_splits > 1,
        PRECISION="tf32x3",  # for float32: three products that together keep its precision
        # Triton's interpreter multiplies bfloat16 as if it were integers
        WIDEN=not query.is_cuda,
        num_warps=8 if block_m * block_d > 4096 else 4,
        # a second block of keys and values only if shared memory certainly holds it
        num_stages=2 if block_d * query.element_size() <= 256 else 1,
    )
    if num_splits > 1:
        _weigh[(num_tokens * num_heads,)](
            sums,
            weights,
            rows.place,
            out,
            num_tokens * num_heads,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_S=triton.next_power_of_2(num_splits),
        )
    return out


@cached
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _choose_splits(num_programs: int, longest: int | None, device: torch.device) -> int:
    """Return the number that gives two programs per processor, at most the blocks of a row."""
    splits = min(_MOST_SPLITS, 2 * _num_processors(device) // num_programs)
    if longest is not None:
        splits = min(splits, -(-longest // _BLOCK))
    return max(1, splits)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_PARTS)
def _attend(
    query,
    pool,
    table,
    firsts,
    widths,
    starts,
    slots,
    positions,
    bits,
    biases,
    sums,
    weights,
    query_token_stride,
    query_head_stride,
    table_stride,
    num_tokens,
    num_words,
    num_splits,
    bias_stride,
    scale,
    cap,
    NUM_KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_BIASES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(1)
    split = tl.program_id(2)
    width = tl.load(widths + row).to(tl.int32)
    if tile * BLOCK_M >= width * GROUPS:
        return
    first = tl.load(firsts + row).to(tl.int32)
    start = tl.load(starts + row).to(tl.int32)
    blocks = table + tl.load(slots + row) * table_stride

    # query m is head m % G of token m // G
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    within = m // GROUPS
    head = kv_head * GROUPS + m % GROUPS
    is_query = within < width
    token = tl.where(is_query, first + within, first).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    at = token[:, None] * query_token_stride + head[:, None] * query_head_stride + d[None, :]
    q = tl.load(query + at, mask=is_query[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    q_position = tl.load(positions + token).to(tl.int32)
    head_biases = biases + head * bias_stride

    # no token after the last one of this tile is seen: ancestors are before descendants
    stop = start + tl.minimum(width, (tile * BLOCK_M + BLOCK_M - 1) // GROUPS + 1)
    end = tl.cdiv(stop, BLOCK)
    begin = end * 0
    if WINDOW > 0:
        # a chain's positions are start + place; a tree's are at least its root's, start
        lowest = start
        if not HAS_BITS:
            lowest = start + tile * BLOCK_M // GROUPS
        begin = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK
    share = tl.cdiv(end - begin, num_splits)
    begin = begin + split * share
    end = tl.minimum(begin + share, end)
    whole = tl.minimum(start // BLOCK, end)  # blocks before this one were cached before

    highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for b in range(begin, whole):
        acc, total, highest = _add_block(
            acc, total, highest, q, b, pool, blocks, positions, bits, num_words, kv_head, first,
            start, stop, token, within, q_position, scale, cap, head_biases, False, NUM_KV_HEADS,
            HEAD_DIM, BLOCK_D, BLOCK, WINDOW, CAPPED, HAS_BITS, HAS_BIASES, PRECISION, WIDEN,
        )  # fmt: skip
    # a pipeline of ancestor bits would take more shared memory than small devices have
    for b in tl.range(tl.maximum(begin, whole), end, num_stages=1 if HAS_BITS else None):
        acc, total, highest = _add_block(
            acc, total, highest, q, b, pool, blocks, positions, bits, num_words, kv_head, first,
            start, stop, token, within, q_position, scale, cap, head_biases, True, NUM_KV_HEADS,
            HEAD_DIM, BLOCK_D, BLOCK, WINDOW, CAPPED, HAS_BITS, HAS_BIASES, PRECISION, WIDEN,
        )  # fmt: skip

    line = (split * num_tokens + token) * (NUM_KV_HEADS * GROUPS) + head
    if IS_SPLIT:
        tl.store(weights + 2 * line, highest, mask=is_query)
        tl.store(weights + 2 * line + 1, total, mask=is_query)
        # a total of zero marks that there is no sum
        is_query = within < tl.where(begin < end, width, 0)
    else:
        acc = acc / tl.maximum(total, 1.0e-30)[:, None]
    tl.store(
        sums + line[:, None] * HEAD_DIM + d[None, :],
        acc.to(sums.dtype.element_ty),
        mask=is_query[:, None] & (d < HEAD_DIM)[None, :],
    )


@triton.jit
def _add_block(
    acc,
    total,
    highest,
    q,
    b,
    pool,
    blocks,
    positions,
    bits,
    num_words,
    kv_head,
    first,
    start,
    stop,
    token,
    within,
    q_position,
    scale,
    cap,
    head_biases,  # [M] offsets of the biases of each query's head
    NEW: tl.constexpr,  # whether the block holds some of the row's new tokens
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_BIASES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Return the running softmax sum after one more block of keys and values."""
    offset = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    cached_at = b * BLOCK + offset
    place = tl.load(blocks + b).to(tl.int64) * BLOCK + offset
    keys = pool + (place[:, None] * (2 * NUM_KV_HEADS) + kv_head) * HEAD_DIM + d[None, :]
    values = keys + NUM_KV_HEADS * HEAD_DIM
    if NEW:
        # values after the row's end are undefined, and 0 * nan is nan
        valid = (cached_at < stop)[:, None] & (d < HEAD_DIM)[None, :]
        key = tl.load(keys, mask=valid, other=0.0)
        value = tl.load(values, mask=valid, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        key = tl.load(keys, mask=(d < HEAD_DIM)[None, :], other=0.0)
        value = tl.load(values, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        key = tl.load(keys)
        value = tl.load(values)

    if WIDEN:
        score = tl.dot(q.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision=PRECISION)
    else:
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
    score = score * scale
    if CAPPED:
        score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)  # cap * tanh(score / cap)
    k_position = cached_at
    if NEW:
        new = tl.maximum(cached_at - start, 0)  # the place among the row's new tokens
        is_new = (cached_at >= start) & (cached_at < stop)
        if HAS_BITS:
            at = token[:, None] * num_words + (new // 32)[None, :]
            word = tl.load(bits + at, mask=is_new[None, :], other=0)
            ancestor = ((word >> (new % 32)[None, :]) & 1) != 0
            seen = (cached_at < start)[None, :] | (is_new[None, :] & ancestor)
        else:
            seen = cached_at[None, :] <= start + within[:, None]
        score = tl.where(seen, score, float("-inf"))
        if WINDOW > 0 or HAS_BIASES:
            depth = tl.load(positions + first + new, mask=is_new, other=0).to(tl.int32)
            k_position = tl.where(is_new, depth, k_position)
    if HAS_BIASES:
        at = head_biases[:, None] + k_position[None, :]
        score += tl.load(at, mask=(cached_at < stop)[None, :], other=0.0)
    if WINDOW > 0:
        near = k_position[None, :] > q_position[:, None] - WINDOW
        score = tl.where(near, score, float("-inf"))

    score = score * 1.4426950408889634  # to the base of 2
    raised = tl.maximum(highest, tl.max(score, axis=1))
    weight = tl.exp2(score - raised[:, None])
    kept = tl.exp2(highest - raised)
    total = total * kept + tl.sum(weight, axis=1)
    weight = weight.to(value.dtype)
    if WIDEN:
        added = tl.dot(weight.to(tl.float32), value.to(tl.float32), input_precision=PRECISION)
    else:
        added = tl.dot(weight, value, input_precision=PRECISION)
    return acc * kept[:, None] + added, total, raised


@triton.jit(
    do_not_specialize=["num_lines", "num_splits"], do_not_specialize_on_alignment=["places"]
)
def _weigh(
    sums,
    weights,
    places,
    out,
    num_lines,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the weighted sums [S, D] of one token and head."""
    line = tl.program_id(0).to(tl.int64)
    if tl.load(places + line // NUM_HEADS) == 0:  # padding has no sum
        return
    split = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    at = split * num_lines + line
    total = tl.load(weights + 2 * at + 1, mask=split < num_splits, other=0.0)
    counts = total != 0.0  # nan counts: it must not be lost
    highest = tl.load(weights + 2 * at, mask=counts, other=-1.0e30)
    weight = tl.where(counts, tl.exp2(highest - tl.max(highest, axis=0)), 0.0)
    valid = counts[:, None] & (d < HEAD_DIM)[None, :]
    part = tl.load(sums + at[:, None] * HEAD_DIM + d[None, :], mask=valid, other=0.0)
    acc = tl.sum(part * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out + line * HEAD_DIM + d, acc.to(out.dtype.element_ty), mask=d < HEAD_DIM)
