"""Attention of one row's tokens over its keys and values, where they lie, for one key-value head.

Keys and values are packed as weights are (`tiles.py`), so both products of attention are the same
products: of keys [positions, d] with queries, and of values [d, positions] with the weights of the
softmax. A layer's storage of a row, by key-value head: keys in blocks of 16 positions, values in blocks
of 16 numbers. Positions that a token does not see get the weight 0, which changes no bit of a sum; a
path of a tree is laid out as the chain that it may become. So a token's bits depend on its own row up to
its own position alone.
Symbols: L positions, W tokens of a row, G query heads of a key-value head, d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numba import njit

from paceline.models.compiled.rows import Rows, norm_in_place, tanh, turn
from paceline.models.compiled.simd import (
    copy_half,
    copy_word,
    exp,
    field,
    float_field,
    get_f32,
    get_int,
    keep_lanes,
    larger,
    load,
    max_lanes,
    put_bf16,
    put_f32,
    splat,
    store,
    store_bf16,
    sum_lanes,
)
from paceline.models.compiled.tables import (
    ANGLES,
    ANGLES_STRIDE,
    ATTENDED,
    CAPACITY,
    EPSILON_F,
    FIRST,
    HALF_TURNED,
    HEAD_ROOM,
    HEAD_SIZE,
    HEADS,
    KEY_NORM,
    KV_HEADS,
    NORM_WHOLE,
    PATHS,
    POSITIONS,
    PROJECTED,
    QUERY_NORM,
    SCORE_CAP_F,
    SCORE_ROOM,
    SCORE_SCALE_F,
    START,
    STORAGE,
    TURNS,
    VALUE_ROOM,
    WIDTH,
    WINDOW,
)

if TYPE_CHECKING:
    from collections.abc import Callable

UNIT: Final = 32  # positions; products with values begin and end at its multiples
GROUP: Final = 64  # positions; products with keys end at its multiples
ROWS_UNIT: Final = 32  # rows of scratch are rounded up, for AMX

compiled = njit(error_model="numpy")


@compiled
def up_to(number, unit):
    """Return the next multiple of a unit."""
    return (number + unit - 1) // unit * unit


@compiled
def tail_room(width):
    """Return the positions of a tree's own values: less than a unit, and its longest path."""
    return up_to(UNIT + width, UNIT)


def attention_bytes(
    head_room: int, value_room: int, rows: int, groups: int, score_room: int, width: int
) -> int:
    """Return the bytes that a piece of `rows` queries needs: queries, scores, weights, sums, a tail.

    width: tokens of the widest tree.
    """
    whole, few = -(-rows // ROWS_UNIT) * ROWS_UNIT, -(-groups // ROWS_UNIT) * ROWS_UNIT
    tail = -(-(UNIT + width) // UNIT) * UNIT if width else 0
    # a tree's tokens are multiplied one by one, and whole tiles of rows are read
    after = few * score_room if width else 0
    numbers = whole * (head_room + 2 * score_room + value_room + 1) + value_room * (tail + few)
    numbers += after
    return 4 * numbers + 8 * 64


@compiled
def prepare_head(x, model, layer, position, head_norm):
    """Norm and rotate a head's query or key in place."""
    norm = field(layer, head_norm)
    if norm != 0 and field(model, NORM_WHOLE) == 0:
        room = field(model, HEAD_ROOM)
        size = field(model, HEAD_SIZE)
        norm_in_place(x, norm, size, room, float_field(model, EPSILON_F))
    turns, half = field(layer, TURNS), field(model, HALF_TURNED)
    if turns >= 0:
        angles = field(model, ANGLES) + turns * field(model, ANGLES_STRIDE)
        turn(x, angles + 8 * half * position, half)


def make_attention(product: Callable[..., Any], dtype: str, rows: Rows) -> tuple[Any, Any]:
    """Return (store_keys, attend), for keys and values of `bfloat16` or `float32`.

    product: of that dtype. rows: of the inputs of the next product.

    store_keys(job, model, layer, span, head, first, stop, layer_index) caches the keys and values of
    tokens first to stop - 1 of a row. attend(..., scratch, layer_index) writes their attention output
    into the inputs of the next product.
    """
    row_bytes, put_inputs, _ = rows
    half = dtype == "bfloat16"
    word = 2 if half else 1  # numbers of a word
    size = 4 // word  # bytes of a number

    @compiled
    def head_storage(model, span, head, layer_index):
        """Return the addresses of a head's keys and values."""
        capacity = field(span, CAPACITY)
        key_bytes = capacity * field(model, HEAD_ROOM) * size
        value_bytes = capacity * field(model, VALUE_ROOM) * size
        heads = field(model, KV_HEADS)
        layer = field(span, STORAGE) + layer_index * heads * (key_bytes + value_bytes)
        return layer + head * key_bytes, layer + heads * key_bytes + head * value_bytes

    @compiled
    def put_number(target, number):
        if half:
            put_bf16(target, number)
        else:
            put_f32(target, number)

    @compiled
    def value_place(values, words, position, number):
        """Return the address of one number of a value. words: of a block."""
        in_block = (number // 16 * words + position // word) * 64
        return values + in_block + number % 16 * 4 + position % word * size

    @compiled
    def store_keys(job, model, layer, span, head, first, stop, layer_index):
        room = field(model, HEAD_ROOM)
        heads, kv_heads = field(model, HEADS), field(model, KV_HEADS)
        head_size = field(model, HEAD_SIZE)
        stride = 4 * (heads + 2 * kv_heads) * room
        keys, values = head_storage(model, span, head, layer_index)
        value_words = field(span, CAPACITY) // word
        start, first_token = field(span, START), field(span, FIRST)
        for token in range(first, stop):
            packed = first_token + token
            row = field(job, PROJECTED) + packed * stride
            key = row + 4 * (heads + head) * room
            value = row + 4 * (heads + kv_heads + head) * room
            turned = get_int(field(job, POSITIONS) + 8 * packed)
            prepare_head(key, model, layer, turned, KEY_NORM)
            position = start + token
            if half:  # rounded where it stands, so that words can be copied
                for at in range(0, room, 16):
                    store_bf16(key + 2 * at, load(key + 4 * at))
            place = keys + (position // 16 * (room // word)) * 64 + position % 16 * 4
            for at in range(room // word):
                copy_word(place + 64 * at, key + 4 * at)
            for at in range(head_size):
                put_number(value_place(values, value_words, position, at), get_f32(value + 4 * at))

    @compiled
    def put_query(job, model, layer, packed, head, target):
        """Norm, rotate and round one query into a row of inputs."""
        room = field(model, HEAD_ROOM)
        heads = field(model, HEADS) + 2 * field(model, KV_HEADS)
        query = field(job, PROJECTED) + 4 * (packed * heads + head) * room
        turned = get_int(field(job, POSITIONS) + 8 * packed)
        prepare_head(query, model, layer, turned, QUERY_NORM)
        for at in range(0, room, 16):
            if half:
                store_bf16(target + 2 * at, load(query + 4 * at))
            else:
                store(target + 4 * at, load(query + 4 * at))

    @compiled
    def put_weights(scores, weights, low, high, base, top, scale, cap):
        """Turn scores of positions low to high - 1 into rounded softmax weights; return their sum.

        Positions from base to top - 1 that are not among them get the weight 0. scores: float32 by
        position, which are overwritten.
        """
        largest = splat(np.float32(-1e30))
        begin = low // 16 * 16
        factor = splat(scale)
        for at in range(begin, high, 16):
            score = load(scores + 4 * at) * factor
            if cap != np.float32(0):
                bound = splat(cap)
                score = bound * tanh(score / bound)
            score = keep_lanes(score, low - at, high - at)
            store(scores + 4 * at, score)
            largest = larger(largest, score)
        most, total = splat(max_lanes(largest)), splat(np.float32(0))
        zero = splat(np.float32(0))
        for at in range(base, begin, 16):
            if half:
                store_bf16(weights + 2 * at, zero)
            else:
                store(weights + 4 * at, zero)
        for at in range(begin, high, 16):
            weight = exp(load(scores + 4 * at) - most)
            total = total + weight
            if half:
                store_bf16(weights + 2 * at, weight)
            else:
                store(weights + 4 * at, weight)
        for at in range(up_to(high, 16), top, 16):
            if half:
                store_bf16(weights + 2 * at, zero)
            else:
                store(weights + 4 * at, zero)
        return sum_lanes(total)

    @compiled
    def put_outputs(job, model, packed, head, sums, total):
        """Divide the sums of a query by its softmax's and round them into the next product's inputs."""
        room = field(model, HEAD_ROOM)
        width = field(model, HEADS) * room
        row = field(job, ATTENDED) + packed * row_bytes(width)
        inverse = splat(np.float32(1) / total)
        for at in range(0, room, 32):
            first, second = load(sums + 4 * at) * inverse, load(sums + 4 * at + 64) * inverse
            put_inputs(row, width, head * room + at, first, second)

    @compiled
    def sum_values(values, words, value_room, weights, stride, first, stop, sums, fresh, rows):
        """Add the values of positions first to stop - 1 by their weights."""
        for group in range(0, value_room, 64):
            product(
                values + (group // 16 * words + first // word) * 64,
                words * 64,
                weights + first * size,
                stride,
                (stop - first) // word,
                sums + 4 * group,
                4 * value_room,
                fresh,
                rows,
            )

    @compiled
    def copy_value(target, target_words, at, source, source_words, place, value_room):
        """Copy the value of one position."""
        for block in range(value_room // 16):
            to = target + (block * target_words + at // word) * 64 + at % word * size
            of = source + (block * source_words + place // word) * 64 + place % word * size
            for lane in range(0, 64, 4):
                if half:
                    copy_half(to + lane, of + lane)
                else:
                    copy_word(to + lane, of + lane)

    @compiled
    def clear_values(target, words, first, stop, value_room):
        """Zero the values of whole words of positions."""
        zero = splat(np.float32(0))
        for block in range(value_room // 16):
            for at in range(first // word, stop // word):
                store(target + (block * words + at) * 64, zero)

    @compiled
    def attend_paths(
        job, model, span, head, first, stop, scratch, base, values, weights, sums, totals
    ):
        """Sum the values of a tree's paths, each laid out as the chain that it may become.

        The cached positions before the row's last whole unit are common to all tokens. What follows is
        laid out again where a path leaves the one before.
        """
        value_room = field(model, VALUE_ROOM)
        groups = field(model, HEADS) // field(model, KV_HEADS)
        start, width = field(span, START), field(span, WIDTH)
        words, stride = field(span, CAPACITY) // word, 4 * field(job, SCORE_ROOM)
        rows = (stop - first) * groups
        few = up_to(groups, ROWS_UNIT)
        own = up_to(totals + 4 * up_to(rows, ROWS_UNIT), 64)  # sums of one token's queries
        tail = up_to(own + 4 * few * value_room, 64)
        tail_words = tail_room(width) // word
        common = max(base, start // UNIT * UNIT)
        if common > base:
            sum_values(values, words, value_room, weights, stride, base, common, sums, 1, rows)
        clear_values(tail, tail_words, 0, tail_room(width), value_room)
        for at in range(common, start):
            copy_value(tail, tail_words, at - common, values, words, at, value_room)
        for token in range(first, stop):
            path = field(span, PATHS) + 8 * token * (width + 1)
            before = path - 8 * (width + 1)
            depth, same = get_int(path), 0  # same: leading tokens that lie there already
            if token > first:
                both = min(depth, get_int(before))
                while same < both and get_int(path + 8 + 8 * same) == get_int(
                    before + 8 + 8 * same
                ):
                    same += 1
            for k in range(same, depth):
                place = start + get_int(path + 8 + 8 * k)
                at = start - common + k
                copy_value(tail, tail_words, at, values, words, place, value_room)
            row = (token - first) * groups
            for at in range(0, groups * value_room, 16):
                store(own + 4 * at, load(sums + 4 * (row * value_room + at)))
            top = up_to(start - common + depth, UNIT)
            at = weights + row * stride + common * size
            fresh = 0 if common > base else 1
            sum_values(tail, tail_words, value_room, at, stride, 0, top, own, fresh, groups)
            packed = field(span, FIRST) + token
            for g in range(groups):
                total = get_f32(totals + 4 * (row + g))
                at = own + 4 * g * value_room
                put_outputs(job, model, packed, head * groups + g, at, total)

    @compiled
    def attend(job, model, layer, span, head, first, stop, scratch, layer_index):
        room, value_room = field(model, HEAD_ROOM), field(model, VALUE_ROOM)
        groups = field(model, HEADS) // field(model, KV_HEADS)
        start, first_token = field(span, START), field(span, FIRST)
        window, paths = field(layer, WINDOW), field(span, PATHS)
        scale, cap = float_field(layer, SCORE_SCALE_F), float_field(layer, SCORE_CAP_F)
        keys, values = head_storage(model, span, head, layer_index)
        value_words = field(span, CAPACITY) // word
        rows = (stop - first) * groups
        whole_rows, stride = up_to(rows, ROWS_UNIT), 4 * field(job, SCORE_ROOM)
        queries = up_to(scratch, 64)
        scores = queries + 4 * whole_rows * room
        weights = scores + whole_rows * stride
        sums = weights + whole_rows * stride
        totals = sums + 4 * whole_rows * value_room
        for token in range(first, stop):
            for g in range(groups):
                at = queries + ((token - first) * groups + g) * room * size
                put_query(job, model, layer, first_token + token, head * groups + g, at)
        # a tree's tokens lie at their places, which are no positions
        width = field(span, WIDTH)
        end = start + stop if paths == 0 else start + width
        lowest = start + first + 1 - window if window > 0 else 0
        base = max(0, lowest) // UNIT * UNIT if paths == 0 else 0
        if paths != 0 and window > 0:
            base = max(0, start + 1 - window) // UNIT * UNIT
        for at in range(base // 16, up_to(end, GROUP) // 16, 4):
            product(
                keys + at * (room // word) * 64,
                room // word * 64,
                queries,
                room * size,
                room // word,
                scores + 64 * at,
                stride,
                1,
                rows,
            )
        top = up_to(end, UNIT)
        for token in range(first, stop):
            position = start + token
            if paths != 0:
                path = paths + 8 * token * (width + 1)
                depth = get_int(path)
                position = start + depth - 1
            low = max(0, position + 1 - window) if window > 0 else 0
            for g in range(groups):
                row = (token - first) * groups + g
                score = scores + row * stride
                if paths != 0:  # in the order of the path, as a chain would lie
                    for k in range(depth):
                        place = get_int(path + 8 * (k + 1))
                        copy_word(score + 4 * (start + k), score + 4 * (start + place))
                total = put_weights(
                    score, weights + row * stride, low, position + 1, base, top, scale, cap
                )
                put_f32(totals + 4 * row, total)
        if paths != 0:
            attend_paths(
                job, model, span, head, first, stop, scratch, base, values, weights, sums, totals
            )
            return
        sum_values(values, value_words, value_room, weights, stride, base, top, sums, 1, rows)
        for token in range(first, stop):
            for g in range(groups):
                row = (token - first) * groups + g
                at = sums + 4 * row * value_room
                put_outputs(
                    job,
                    model,
                    first_token + token,
                    head * groups + g,
                    at,
                    get_f32(totals + 4 * row),
                )

    return store_keys, attend
