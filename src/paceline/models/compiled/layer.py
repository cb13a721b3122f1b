"""One decoder layer: its phases, in the order of `phases.py`.

Every phase is one thread's part, made by `in_pieces` of what does one piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.models.compiled.attention import make_attention
from paceline.models.compiled.keys import make_heads
from paceline.models.compiled.memory import field, float_field, load, store
from paceline.models.compiled.phases import (
    ATTEND_PHASE,
    CROSS_ATTEND_PHASE,
    CROSS_NORM_PHASE,
    CROSS_OUT_PHASE,
    CROSS_QUERY_PHASE,
    DOWN_PHASE,
    GATE_UP_PHASE,
    NORM_1_PHASE,
    NORM_2_PHASE,
    NORM_ROWS,
    OUT_PHASE,
    POST_1_PHASE,
    POST_2_PHASE,
    QKV_PHASE,
    STORE_PHASE,
    STORE_TOKENS,
    WHOLE_NORMS_PHASE,
    find_piece,
)
from paceline.models.compiled.products import TILE_BYTES, make_product
from paceline.models.compiled.residual import (
    Norms,
    add_normed_phase,
    make_add_product,
    make_norms,
    tile_of,
)
from paceline.models.compiled.rows import Rows, activate, norm_in_place
from paceline.models.compiled.sharing import in_pieces
from paceline.models.compiled.tables import (
    ACTIVATED,
    ACTIVATION,
    ATTENDED,
    CROSS_NORM,
    CROSS_OUT,
    CROSS_QUERY,
    DOWN,
    DOWN_BIAS,
    EPSILON_F,
    GATE_UP,
    GATE_UP_BIAS,
    GATED,
    HEAD_ROOM,
    HEAD_SIZE,
    HEADS,
    HIDDEN_ROOM,
    KEY_NORM,
    KV_HEADS,
    MLP_GROUPS,
    MLP_ROOM,
    NORM_1,
    NORM_2,
    OUT,
    OUT_BIAS,
    POST_NORM_1,
    POST_NORM_2,
    PROJECTED,
    QKV,
    QKV_BIAS,
    QUERY_NORM,
    QUERY_TOKENS,
    SPAN_SIZE,
    SPANS,
    STORES_FIRST,
    TOKENS,
    WIDTH,
)
from paceline.models.compiled.vectors import compiled

if TYPE_CHECKING:
    from collections.abc import Callable


def make_project(
    multiply: Callable[..., Any], norms: Norms, rows: Rows, word: int
) -> Callable[..., Any]:
    """Return the phase that computes queries, and keys and values if they are wanted.

    given: (the norm before it, weights, bias, heads), of which the first three are addresses. word:
    inputs of a word.
    """
    row_bytes, inputs_of = rows.row_bytes, norms.inputs_of

    @compiled
    def project_piece(job, model, given, private, piece, is_first):
        before, weights, bias, heads = given
        x = inputs_of(job, model, before, private, is_first)
        room, tile = field(model, HIDDEN_ROOM), tile_of(model, private)
        outputs = heads * field(model, HEAD_ROOM)
        all_heads = field(model, HEADS) + 2 * field(model, KV_HEADS)
        width, groups = all_heads * field(model, HEAD_ROOM), (outputs + 63) // 64
        group, first, rows = multiply(
            weights, bias, room // word, x, row_bytes(room), tile, field(job, TOKENS), groups, piece
        )
        count = min(64, outputs - 64 * group)
        for row in range(rows):
            to = field(job, PROJECTED) + 4 * ((first + row) * width + 64 * group)
            for at in range(0, count, 16):
                store(to + 4 * at, load(tile + 256 * row + 4 * at))

    return in_pieces(project_piece)


@compiled
def _whole_norms_piece(job, model, layer, private, piece, is_first):
    head, d = field(model, HEAD_ROOM), field(model, HEAD_SIZE)
    heads, kv_heads = field(model, HEADS), field(model, KV_HEADS)
    eps = float_field(model, EPSILON_F)
    stop = min(field(job, TOKENS), (piece + 1) * NORM_ROWS)
    for token in range(piece * NORM_ROWS, stop):
        x = field(job, PROJECTED) + 4 * token * (heads + 2 * kv_heads) * head
        norm_in_place(x, field(layer, QUERY_NORM), heads * d, heads * head, eps)
        x += 4 * heads * head
        norm_in_place(x, field(layer, KEY_NORM), kv_heads * d, kv_heads * head, eps)


# norms all queries, and all keys, of a token at once; given: the layer's table
whole_norms = in_pieces(_whole_norms_piece)


def make_attention_phases(
    kernels: str, dtype: str, rows: Rows
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return the phases that store keys and values, attend to them, and attend to the source.

    given: (the layer's table, its index). dtype: of keys and values. rows: of the inputs of the next
    product.
    """
    heads = make_heads(kernels, dtype)
    store_keys = heads.store_keys
    attend, attend_to_source = make_attention(make_product(kernels, dtype), heads, rows)

    @compiled
    def store_piece(job, model, given, private, piece, is_first):
        layer, index = given
        span, head, first = find_piece(job, field(model, KV_HEADS), STORE_TOKENS, piece)
        stop = min(field(span, WIDTH), first + STORE_TOKENS)
        store_keys(job, model, layer, span, head, first, stop, index)

    @compiled
    def find_queries(job, model, piece):
        """Return (span, head, first token, the one after the last) of a piece of attention."""
        kv_heads = field(model, KV_HEADS)
        if field(job, STORES_FIRST) != 0:
            tokens = field(job, QUERY_TOKENS)
            span, head, first = find_piece(job, kv_heads, tokens, piece)
            return span, head, first, min(field(span, WIDTH), first + tokens)
        span = field(job, SPANS) + 8 * SPAN_SIZE * (piece // kv_heads)
        return span, piece % kv_heads, 0, field(span, WIDTH)

    @compiled
    def attend_piece(job, model, given, private, piece, is_first):
        layer, index = given
        span, head, first, stop = find_queries(job, model, piece)
        if field(job, STORES_FIRST) == 0:
            store_keys(job, model, layer, span, head, first, stop, index)
        scratch = tile_of(model, private) + TILE_BYTES
        attend(job, model, layer, span, head, first, stop, scratch, index)

    @compiled
    def source_piece(job, model, given, private, piece, is_first):
        layer, index = given
        span, head, first, stop = find_queries(job, model, piece)
        scratch = tile_of(model, private) + TILE_BYTES
        attend_to_source(job, model, layer, span, head, first, stop, scratch, index)

    return in_pieces(store_piece), in_pieces(attend_piece), in_pieces(source_piece)


def make_gate_up(
    multiply: Callable[..., Any], norms: Norms, rows: Rows, word: int
) -> Callable[..., Any]:
    """Return the phase that computes act(gate) * up; given: the layer's table. word: inputs of a word.

    A group of 64 outputs holds 32 numbers of the gate and 32 of up. Without a gate it is act(up).
    """
    row_bytes, put_inputs, _ = rows
    inputs_of = norms.inputs_of

    @compiled
    def put_ungated(job, tile, kind, width, group, first, rows):
        """Activate a group of 64 numbers of F into the inputs of the next product."""
        for row in range(rows):
            to = field(job, ACTIVATED) + (first + row) * row_bytes(width)
            for at in range(0, 64, 32):
                numbers = tile + 256 * row + 4 * at
                one, two = activate(load(numbers), kind), activate(load(numbers + 64), kind)
                put_inputs(to, width, 64 * group + at, one, two)

    @compiled
    def gate_up_piece(job, model, layer, private, piece, is_first):
        x = inputs_of(job, model, field(layer, NORM_2), private, is_first)
        room, tile = field(model, HIDDEN_ROOM), tile_of(model, private)
        weights, bias, groups = (
            field(layer, GATE_UP),
            field(layer, GATE_UP_BIAS),
            field(model, MLP_GROUPS),
        )
        group, first, rows = multiply(
            weights, bias, room // word, x, row_bytes(room), tile, field(job, TOKENS), groups, piece
        )
        kind, width = field(model, ACTIVATION), field(model, MLP_ROOM)
        if field(model, GATED) == 0:
            put_ungated(job, tile, kind, width, group, first, rows)
            return
        for row in range(rows):
            to = field(job, ACTIVATED) + (first + row) * row_bytes(width)
            at = tile + 256 * row
            one = activate(load(at), kind) * load(at + 128)
            two = activate(load(at + 64), kind) * load(at + 192)
            put_inputs(to, width, 32 * group, one, two)

    return in_pieces(gate_up_piece)


def make_layer(
    kernels: str, dtype: str, multiply: Callable[..., Any], rows: Rows, word: int
) -> Callable[..., Any]:
    """Return run_layer(job, model, layer, index, phase, size, thread, tag).

    It does one thread's part in a layer's phases and returns False if the job is over. phase: address of
    the first phase's counters; size: bytes of a phase's counters. dtype: of the model. word: inputs of a
    word.
    """
    norms = make_norms(rows)
    norm = norms.phase
    project, gate_up = (
        make_project(multiply, norms, rows, word),
        make_gate_up(multiply, norms, rows, word),
    )
    store_phase, attend_phase, source_phase = make_attention_phases(kernels, dtype, rows)
    add_product = make_add_product(multiply, rows, word)

    @compiled
    def run_attention(job, model, layer, index, phase, size, thread, tag):
        norm_1, post = field(layer, NORM_1), field(layer, POST_NORM_1)
        width = field(model, HEADS) * field(model, HEAD_ROOM)
        out = (field(layer, OUT), field(layer, OUT_BIAS), post, field(job, ATTENDED), width)
        of_layer, heads = (layer, index), field(model, HEADS) + 2 * field(model, KV_HEADS)
        qkv = (norm_1, field(layer, QKV), field(layer, QKV_BIAS), heads)
        return (
            norm(job, model, norm_1, phase + NORM_1_PHASE * size, thread, tag)
            and project(job, model, qkv, phase + QKV_PHASE * size, thread, tag)
            and whole_norms(job, model, layer, phase + WHOLE_NORMS_PHASE * size, thread, tag)
            and store_phase(job, model, of_layer, phase + STORE_PHASE * size, thread, tag)
            and attend_phase(job, model, of_layer, phase + ATTEND_PHASE * size, thread, tag)
            and add_product(job, model, out, phase + OUT_PHASE * size, thread, tag)
            and add_normed_phase(job, model, post, phase + POST_1_PHASE * size, thread, tag)
        )

    @compiled
    def run_cross(job, model, layer, index, phase, size, thread, tag):
        before, heads = field(layer, CROSS_NORM), field(model, HEADS)
        query = (before, field(layer, CROSS_QUERY), 0, heads)
        width = heads * field(model, HEAD_ROOM)
        out = (field(layer, CROSS_OUT), 0, 0, field(job, ATTENDED), width)
        of_layer = (layer, index)
        return (
            norm(job, model, before, phase + CROSS_NORM_PHASE * size, thread, tag)
            and project(job, model, query, phase + CROSS_QUERY_PHASE * size, thread, tag)
            and source_phase(job, model, of_layer, phase + CROSS_ATTEND_PHASE * size, thread, tag)
            and add_product(job, model, out, phase + CROSS_OUT_PHASE * size, thread, tag)
        )

    @compiled
    def run_mlp(job, model, layer, phase, size, thread, tag):
        norm_2, post = field(layer, NORM_2), field(layer, POST_NORM_2)
        width = field(model, MLP_ROOM)
        down = (field(layer, DOWN), field(layer, DOWN_BIAS), post, field(job, ACTIVATED), width)
        return (
            norm(job, model, norm_2, phase + NORM_2_PHASE * size, thread, tag)
            and gate_up(job, model, layer, phase + GATE_UP_PHASE * size, thread, tag)
            and add_product(job, model, down, phase + DOWN_PHASE * size, thread, tag)
            and add_normed_phase(job, model, post, phase + POST_2_PHASE * size, thread, tag)
        )

    @compiled
    def run_layer(job, model, layer, index, phase, size, thread, tag):
        is_on = run_attention(job, model, layer, index, phase, size, thread, tag)
        if field(layer, CROSS_QUERY) != 0:
            is_on = is_on and run_cross(job, model, layer, index, phase, size, thread, tag)
        return is_on and run_mlp(job, model, layer, phase, size, thread, tag)

    return run_layer
