"""Keys and values of one row, layer and key-value head, where they lie.

They are packed as weights are (`tiles.py`), so that both products of attention are products like the
others: of keys [positions, d] with queries, and of values [d, positions] with the weights of the
softmax. A layer's storage of a row, by key-value head: keys in blocks of 16 positions, values in blocks
of 16 numbers; a word is two bfloat16 or one float32. Symbols: d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paceline.models.compiled.memory import (
    copy_word,
    field,
    float_field,
    get_f32,
    get_int,
    load,
    put_bf16,
    put_f32,
    store,
    store_bf16,
    store_widened,
)
from paceline.models.compiled.rows import inputs_of, norm_in_place, turn
from paceline.models.compiled.tables import (
    ANGLE_TABLES,
    ANGLES,
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
    POSITIONS,
    PROJECTED,
    QUERY_NORM,
    START,
    STORAGE,
    TURNS,
    VALUE_ROOM,
)
from paceline.models.compiled.vectors import compiled

if TYPE_CHECKING:
    from collections.abc import Callable

UNIT: Final = 32  # positions; products with values begin and end at its multiples
GROUP: Final = 64  # positions; products with keys end at its multiples


class Heads(NamedTuple):
    """Functions, compiled by numba, that find and write keys, values and queries of one dtype.

    Queries and the weights of the softmax are inputs of products, of the kind `rows.inputs_of` tells.

    find(model, storage, capacity, head, index): the addresses of a head's keys and values in layer
    `index`. storage: address of a row's keys and values, for `capacity` positions.
    put_lanes(row, at, lanes): round 16 numbers into a row of inputs, from number `at` on.
    store_keys(job, model, layer, span, head, first, stop, index): cache tokens first to stop - 1 of a
    row. put_query(job, model, layer, packed, head, target): norm, rotate and round a packed token's
    query into the row at address `target`.
    """

    size: int  # bytes of a cached number
    input_size: int  # bytes of an input
    word: int  # numbers of a word
    find: Callable[..., Any]
    put_lanes: Callable[..., Any]
    store_keys: Callable[..., Any]
    put_query: Callable[..., Any]


@compiled
def up_to(number, unit):
    """Return the next multiple of a unit."""
    return (number + unit - 1) // unit * unit


@compiled
def prepare_head(x, job, model, layer, packed, head_norm):
    """Norm and rotate the query or key at address x of a packed token in place.

    head_norm: the layer's field of its norm.
    """
    norm = field(layer, head_norm)
    if norm != 0 and field(model, NORM_WHOLE) == 0:
        room, size = field(model, HEAD_ROOM), field(model, HEAD_SIZE)
        norm_in_place(x, norm, size, room, float_field(model, EPSILON_F))
    turns, half = field(layer, TURNS), field(model, HALF_TURNED)
    if turns >= 0:
        position = get_int(field(job, POSITIONS) + 8 * packed)
        at = position * field(model, ANGLE_TABLES) + turns
        turn(x, field(model, ANGLES) + 8 * half * at, half)


@compiled
def projected_head(job, model, packed, head):
    """Return the address of a packed token's head among queries, then keys, then values."""
    heads = field(model, HEADS) + 2 * field(model, KV_HEADS)
    return field(job, PROJECTED) + 4 * (packed * heads + head) * field(model, HEAD_ROOM)


def make_heads(kernels: str, dtype: str) -> Heads:
    """Return the functions for keys and values of `bfloat16` or `float32`."""
    half, inputs = dtype == "bfloat16", inputs_of(kernels, dtype)
    word = 2 if half else 1
    size = 4 // word

    @compiled
    def find(model, storage, capacity, head, index):
        heads = field(model, KV_HEADS)
        key_bytes = capacity * field(model, HEAD_ROOM) * size
        value_bytes = capacity * field(model, VALUE_ROOM) * size
        layer = storage + index * heads * (key_bytes + value_bytes)
        return layer + head * key_bytes, layer + heads * key_bytes + head * value_bytes

    store_inputs = {"bfloat16": store_bf16, "widened": store_widened, "float32": store}[inputs]
    input_size = 2 if inputs == "bfloat16" else 4

    @compiled
    def put_lanes(row, at, lanes):
        store_inputs(row + input_size * at, lanes)

    @compiled
    def put_query(job, model, layer, packed, head, target):
        query = projected_head(job, model, packed, head)
        prepare_head(query, job, model, layer, packed, QUERY_NORM)
        for at in range(0, field(model, HEAD_ROOM), 16):
            put_lanes(target, at, load(query + 4 * at))

    store_keys = _make_store_keys(half, find)
    return Heads(size, input_size, word, find, put_lanes, store_keys, put_query)


def _make_store_keys(half: bool, find: Callable[..., Any]) -> Callable[..., Any]:
    """Return `store_keys`; see `Heads`."""
    word = 2 if half else 1
    size = 4 // word

    @compiled
    def store_key(keys, key, position, room):
        if half:  # rounded where it stands, so that words can be copied
            for at in range(0, room, 16):
                store_bf16(key + 2 * at, load(key + 4 * at))
        place = keys + (position // 16 * (room // word)) * 64 + position % 16 * 4
        for at in range(room // word):
            copy_word(place + 64 * at, key + 4 * at)

    @compiled
    def store_value(values, value, position, words, head_size):
        """Store a value. words: of a block of values."""
        for at in range(head_size):
            block = values + (at // 16 * words + position // word) * 64
            place = block + at % 16 * 4 + position % word * size
            if half:
                put_bf16(place, get_f32(value + 4 * at))
            else:
                put_f32(place, get_f32(value + 4 * at))

    @compiled
    def store_keys(job, model, layer, span, head, first, stop, index):
        heads, kv_heads = field(model, HEADS), field(model, KV_HEADS)
        capacity = field(span, CAPACITY)
        keys, values = find(model, field(span, STORAGE), capacity, head, index)
        words = capacity // word
        for token in range(first, stop):
            packed, position = field(span, FIRST) + token, field(span, START) + token
            key = projected_head(job, model, packed, heads + head)
            prepare_head(key, job, model, layer, packed, KEY_NORM)
            store_key(keys, key, position, field(model, HEAD_ROOM))
            value = projected_head(job, model, packed, heads + kv_heads + head)
            store_value(values, value, position, words, field(model, HEAD_SIZE))

    return store_keys
