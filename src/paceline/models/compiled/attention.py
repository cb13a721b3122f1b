"""Attention of one row's tokens over its keys and values, or its source's, for one key-value head.

Positions that a token does not see get the weight 0, which changes no bit of a sum. So a token's bits
depend on its own row up to its own position alone. Scratch of a piece: queries, scores, weights, sums of
values, sums of weights, and for a tree what `trees.py` needs.
Symbols: G query heads of a key-value head, d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.models.compiled.keys import GROUP, UNIT, Heads, up_to
from paceline.models.compiled.memory import (
    field,
    float_field,
    get_f32,
    get_int,
    load,
    put_f32,
    store,
)
from paceline.models.compiled.positions import bias_of
from paceline.models.compiled.products import ROOM_ROWS
from paceline.models.compiled.rows import Rows, tanh
from paceline.models.compiled.tables import (
    ATTENDED,
    BIAS,
    CAPACITY,
    FIRST,
    HEAD_ROOM,
    HEADS,
    KV_HEADS,
    PATHS,
    SCORE_CAP_F,
    SCORE_ROOM,
    SCORE_SCALE_F,
    SOURCE,
    SOURCE_CAPACITY,
    SOURCE_LENGTH,
    START,
    STORAGE,
    VALUE_ROOM,
    WIDTH,
    WINDOW,
    rounded,
)
from paceline.models.compiled.trees import (
    make_tree_sums,
    order_scores,
    path_of,
)
from paceline.models.compiled.vectors import (
    compiled,
    exp,
    keep_lanes,
    larger,
    max_lanes,
    splat,
    sum_lanes,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def attention_bytes(
    head_room: int, value_room: int, rows: int, groups: int, score_room: int, width: int
) -> int:
    """Return the bytes of scratch that a piece of `rows` queries needs.

    groups: G. score_room: positions in a row of scores. width: tokens of the widest tree, else 0.
    """
    whole, few = rounded(rows, ROOM_ROWS), rounded(groups, ROOM_ROWS)
    tail = rounded(UNIT + width, UNIT) if width else 0
    # a tree's tokens are multiplied one by one, and whole tiles of rows are read
    after = few * score_room if width else 0
    numbers = whole * (head_room + 2 * score_room + value_room + 1) + value_room * (tail + few)
    numbers += after
    return 4 * numbers + 8 * 64


@compiled
def seen_positions(span, window, first, stop):
    """Return the first position, and the one after the last, seen by tokens first to stop - 1.

    The first is a multiple of UNIT. A tree's tokens lie at their places, which are no positions.
    """
    start, is_tree = field(span, START), field(span, PATHS) != 0
    end = start + (field(span, WIDTH) if is_tree else stop)
    lowest = start + (0 if is_tree else first) + 1 - window if window > 0 else 0
    return max(0, lowest) // UNIT * UNIT, end


def make_softmax(put_lanes: Callable[..., Any]) -> Callable[..., Any]:
    """Return put_weights(scores, weights, low, high, base, top, scale, cap, bias).

    It turns float32 scores of positions low to high - 1 into rounded softmax weights and returns their
    sum. Scores are overwritten. Positions from base to top - 1 that are not among them get the weight 0.
    bias: address of what is added to the scaled scores, from position 0 on, or 0.
    """

    @compiled
    def scale_scores(scores, low, high, scale, cap, bias):
        """Scale, cap and bias scores in place; return the largest."""
        largest, factor = splat(np.float32(-1e30)), splat(scale)
        for at in range(low // 16 * 16, high, 16):
            score = load(scores + 4 * at) * factor
            if cap != np.float32(0):
                bound = splat(cap)
                score = bound * tanh(score / bound)
            if bias != 0:
                score = score + load(bias + 4 * at)
            score = keep_lanes(score, low - at, high - at)
            store(scores + 4 * at, score)
            largest = larger(largest, score)
        return max_lanes(largest)

    @compiled
    def put_weights(scores, weights, low, high, base, top, scale, cap, bias):
        most = splat(scale_scores(scores, low, high, scale, cap, bias))
        zero, begin = splat(np.float32(0)), low // 16 * 16
        total = zero
        for at in range(base, begin, 16):
            put_lanes(weights, at, zero)
        for at in range(begin, high, 16):
            weight = exp(load(scores + 4 * at) - most)
            total = total + weight
            put_lanes(weights, at, weight)
        for at in range(up_to(high, 16), top, 16):
            put_lanes(weights, at, zero)
        return sum_lanes(total)

    return put_weights


def make_sum_values(heads: Heads, product: Callable[..., Any]) -> Callable[..., Any]:
    """Return sum_values(values, words, value_room, weights, stride, first, stop, sums, fresh, rows).

    It adds the values of positions first to stop - 1, multiplied by rows of weights, to sums
    [rows, value_room]. words: of a block of values. stride: bytes between rows of weights.
    """
    word, input_size = heads.word, heads.input_size

    @compiled
    def sum_values(values, words, value_room, weights, stride, first, stop, sums, fresh, rows):
        at, count = weights + first * input_size, (stop - first) // word
        for group in range(0, value_room, 64):
            block = values + (group // 16 * words + first // word) * 64
            to = sums + 4 * group
            product(block, words * 64, at, stride, count, to, 4 * value_room, fresh, rows)

    return sum_values


def make_put_outputs(rows: Rows) -> Callable[..., Any]:
    """Return put_outputs(job, model, packed, head, sums, totals).

    It divides a packed token's G sums by the sums of their weights, `totals`, and rounds them into the
    inputs of the next product.
    """
    row_bytes, put_inputs, _ = rows

    @compiled
    def put_outputs(job, model, packed, head, sums, totals):
        room, value_room = field(model, HEAD_ROOM), field(model, VALUE_ROOM)
        width, groups = field(model, HEADS) * room, field(model, HEADS) // field(model, KV_HEADS)
        row = field(job, ATTENDED) + packed * row_bytes(width)
        for g in range(groups):
            inverse = splat(np.float32(1) / get_f32(totals + 4 * g))
            of, column = sums + 4 * g * value_room, (head * groups + g) * room
            for at in range(0, room, 32):
                one, two = load(of + 4 * at) * inverse, load(of + 4 * at + 64) * inverse
                put_inputs(row, width, column + at, one, two)

    return put_outputs


def make_attention(
    product: Callable[..., Any], heads: Heads, rows: Rows
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return attend(job, model, layer, span, head, first, stop, scratch, index), to text and to source.

    They write the attention output of tokens first to stop - 1 of a row into the inputs of the next
    product. product: of keys' and values' dtype. rows: of the inputs of the next product. scratch: an
    address; see `attention_bytes`. index: of the layer.
    """
    word, input_size, put_query = heads.word, heads.input_size, heads.put_query
    find, put_weights = heads.find, make_softmax(heads.put_lanes)
    sum_values, put_outputs = make_sum_values(heads, product), make_put_outputs(rows)
    attend_paths = make_tree_sums(heads, sum_values, put_outputs)

    @compiled
    def score_keys(job, model, keys, base, end, queries, scores, rows):
        """Multiply the keys of positions base to end - 1 with rows of queries."""
        room, stride = field(model, HEAD_ROOM), 4 * field(job, SCORE_ROOM)
        words = room // word
        for at in range(base // GROUP * GROUP // 16, up_to(end, GROUP) // 16, 4):
            block, to = keys + at * words * 64, scores + 64 * at
            product(block, words * 64, queries, room * input_size, words, to, stride, 1, rows)

    @compiled
    def weigh(job, layer, span, head, first, stop, groups, base, top, scores, weights, totals):
        """Turn the scores of tokens first to stop - 1 into weights, and keep the weights' sums."""
        table = field(layer, BIAS)
        scale, cap = float_field(layer, SCORE_SCALE_F), float_field(layer, SCORE_CAP_F)
        start, window, stride = field(span, START), field(layer, WINDOW), 4 * field(job, SCORE_ROOM)
        is_tree = field(span, PATHS) != 0
        for token in range(first, stop):
            path = path_of(span, token)
            high = start + (get_int(path) if is_tree else token + 1)
            low = max(0, high - window) if window > 0 else 0
            for row in range((token - first) * groups, (token + 1 - first) * groups):
                score = scores + row * stride
                if is_tree:
                    order_scores(score + 4 * start, path)
                to = weights + row * stride
                bias = bias_of(table, head * groups + row % groups, high - 1)
                total = put_weights(score, to, low, high, base, top, scale, cap, bias)
                put_f32(totals + 4 * row, total)

    @compiled
    def lay_out(job, model, rows, scratch):
        """Return the addresses of queries, scores, weights, sums and totals of a piece."""
        room, value_room = field(model, HEAD_ROOM), field(model, VALUE_ROOM)
        stride, whole_rows = 4 * field(job, SCORE_ROOM), up_to(rows, ROOM_ROWS)
        queries = up_to(scratch, 64)
        scores = queries + 4 * whole_rows * room
        weights = scores + whole_rows * stride
        sums = weights + whole_rows * stride
        return queries, scores, weights, sums, sums + 4 * whole_rows * value_room

    @compiled
    def put_queries(job, model, layer, span, head, first, rows, groups, queries):
        """Round the queries of a row's tokens from `first` on; a token has `groups` of the rows."""
        size, begin = field(model, HEAD_ROOM) * input_size, field(span, FIRST) + first
        for row in range(rows):
            token, of_head = begin + row // groups, head * groups + row % groups
            put_query(job, model, layer, token, of_head, queries + row * size)

    @compiled
    def put_all_outputs(job, model, span, head, first, stop, groups, sums, totals):
        """Write the outputs of tokens first to stop - 1."""
        for token in range(first, stop):
            row, packed = (token - first) * groups, field(span, FIRST) + token
            of = sums + 4 * row * field(model, VALUE_ROOM)
            put_outputs(job, model, packed, head, of, totals + 4 * row)

    @compiled
    def attend(job, model, layer, span, head, first, stop, scratch, index):
        groups = field(model, HEADS) // field(model, KV_HEADS)
        rows, stride = (stop - first) * groups, 4 * field(job, SCORE_ROOM)
        queries, scores, weights, sums, totals = lay_out(job, model, rows, scratch)
        put_queries(job, model, layer, span, head, first, rows, groups, queries)
        capacity = field(span, CAPACITY)
        keys, values = find(model, field(span, STORAGE), capacity, head, index)
        base, end = seen_positions(span, field(layer, WINDOW), first, stop)
        score_keys(job, model, keys, base, end, queries, scores, rows)
        top = up_to(end, UNIT)
        weigh(job, layer, span, head, first, stop, groups, base, top, scores, weights, totals)
        if field(span, PATHS) != 0:
            attend_paths(job, model, span, head, first, stop, base, values, weights, sums, totals)
            return
        words, value_room = capacity // word, field(model, VALUE_ROOM)
        sum_values(values, words, value_room, weights, stride, base, top, sums, 1, rows)
        put_all_outputs(job, model, span, head, first, stop, groups, sums, totals)

    @compiled
    def attend_to_source(job, model, layer, span, head, first, stop, scratch, index):
        groups = field(model, HEADS) // field(model, KV_HEADS)
        rows, stride = (stop - first) * groups, 4 * field(job, SCORE_ROOM)
        queries, scores, weights, sums, totals = lay_out(job, model, rows, scratch)
        put_queries(job, model, layer, span, head, first, rows, groups, queries)
        capacity, length = field(span, SOURCE_CAPACITY), field(span, SOURCE_LENGTH)
        keys, values = find(model, field(span, SOURCE), capacity, head, index)
        score_keys(job, model, keys, 0, length, queries, scores, rows)
        top, scale, none = up_to(length, UNIT), float_field(layer, SCORE_SCALE_F), np.float32(0)
        for row in range(rows):
            score, to = scores + row * stride, weights + row * stride
            total = put_weights(score, to, 0, length, 0, top, scale, none, 0)
            put_f32(totals + 4 * row, total)
        words, value_room = capacity // word, field(model, VALUE_ROOM)
        sum_values(values, words, value_room, weights, stride, 0, top, sums, 1, rows)
        put_all_outputs(job, model, span, head, first, stop, groups, sums, totals)

    return attend, attend_to_source
