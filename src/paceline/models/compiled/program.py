"""The forward of the Llama family as one compiled function, run by every thread of a job.

A layer is ten phases (`_PHASES`), each a number of pieces that the threads share (`sharing.py`); those
that a model or a job does not need have no pieces. Products are split by groups of 64 outputs and blocks
of tokens, attention by rows and key-value heads. The residual stream and all sums are float32; inputs of
products are rounded to the dtype of the weights.
Symbols: N packed tokens, D hidden size, F MLP size, V logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numba import njit

from paceline.models.compiled.attention import make_attention
from paceline.models.compiled.products import make_product
from paceline.models.compiled.rows import (
    activate,
    add_normed,
    make_embed,
    make_rows,
    norm_in_place,
    tanh,
)
from paceline.models.compiled.sharing import (
    STALE,
    await_all,
    claim,
    finish,
    open_phase,
    phase_bytes,
)
from paceline.models.compiled.simd import (
    field,
    first_bit,
    float_field,
    fma,
    get_f32,
    get_int,
    has_nan,
    lanes_equal,
    larger,
    load,
    load_bf16,
    max_lanes,
    put_f32,
    put_field,
    put_int,
    splat,
    store,
)
from paceline.models.compiled.tables import (
    ACTIVATED,
    ACTIVATION,
    ADDED,
    ATTENDED,
    BEST,
    CHAIN,
    CHOICES,
    COUNTERS,
    DOWN,
    DOWN_BIAS,
    EMBEDDING,
    EMBEDDING_SCALE_F,
    EPSILON_F,
    FINAL_NORM,
    FIRST,
    GATE_UP,
    GATE_UP_BIAS,
    HEAD_BIAS,
    HEAD_ROOM,
    HEAD_SIZE,
    HEAD_WEIGHTS,
    HEADS,
    HIDDEN,
    HIDDEN_OUT,
    HIDDEN_ROOM,
    IDS,
    INPUTS,
    KEY_NORM,
    KV_HEADS,
    LAYER_SIZE,
    LAYER_TABLE,
    LAYERS,
    LIMIT,
    LOGIT_CAP_F,
    LOGIT_SCALE_F,
    LOGITS,
    MLP_GROUPS,
    MODEL,
    NORM_1,
    NORM_2,
    NORM_WHOLE,
    NUM_PICKED,
    OUT,
    OUT_BIAS,
    PICKED,
    POSITIONS,
    POST_NORM_1,
    POST_NORM_2,
    PROJECTED,
    QKV,
    QKV_BIAS,
    QUERY_NORM,
    QUERY_TOKENS,
    RESIDUAL_SCALE_F,
    ROWS,
    RUNS_BODY,
    SCRATCH,
    SCRATCH_STRIDE,
    SKIPPED,
    SKIPS,
    SPAN_SIZE,
    SPANS,
    START,
    STEPS,
    STORES_FIRST,
    STREAM,
    THREADS,
    TILE_CONFIG,
    TOKENS,
    VOCABULARY,
    VOCABULARY_GROUPS,
    WIDTH,
)
from paceline.models.compiled.tiles import configure_tiles, release_tiles

if TYPE_CHECKING:
    from collections.abc import Callable

compiled = njit(error_model="numpy")

# --- phases: one to embed, those of every layer, three for the logits ----------------------------------
(
    _NORM_1,  # inputs of the product for queries, keys and values
    _QKV,
    _WHOLE_NORMS,  # of all queries or keys of a token at once
    _STORE,  # keys and values, where several pieces attend to one row's
    _ATTEND,
    _OUT,
    _POST_1,  # norm of what attention adds
    _NORM_2,
    _GATE_UP,
    _DOWN,
    _POST_2,
    LAYER_PHASES,
) = range(12)
_FINAL, _HEAD, _CHOOSE, END_PHASES = range(4)

FEW: Final = 4  # tokens whose norms every thread computes for itself, which costs less than a phase
BLOCK_ROWS: Final = 128  # tokens of a piece of a product
_NORM_ROWS: Final = 4  # rows of a piece of row operations
_STORE_TOKENS: Final = 64  # of a piece that stores keys
TILE_BYTES: Final = BLOCK_ROWS * 64 * 4  # the sums of a piece
ROOM_ROWS: Final = 32  # rows of buffers are rounded up to it, for AMX


def num_phases(layers: int, steps: int) -> int:
    """Return the phases of a job."""
    return max(1, steps) * (1 + layers * LAYER_PHASES + END_PHASES)


@compiled
def _attend_pieces(job, kv_heads, tokens):
    """Return the pieces of attention, of at most `tokens` tokens each."""
    pieces = 0
    for row in range(field(job, ROWS)):
        span = field(job, SPANS) + 8 * SPAN_SIZE * row
        pieces += (field(span, WIDTH) + tokens - 1) // tokens
    return pieces * kv_heads


@compiled
def plan(job, tag):
    """Open all phases of a job."""
    model, threads = field(job, MODEL), field(job, THREADS)
    kv_heads, layers = field(model, KV_HEADS), field(model, LAYERS)
    head_room, room = field(model, HEAD_ROOM), field(model, HIDDEN_ROOM)
    projected = (field(model, HEADS) + 2 * kv_heads) * head_room
    layer_table = field(model, LAYER_TABLE)
    skipped = field(job, SKIPPED) if field(job, SKIPS) != 0 else 0
    size, phase = phase_bytes(threads), field(job, COUNTERS)
    for step in range(max(1, field(job, STEPS))):
        tokens = field(job, TOKENS) if step == 0 else field(job, ROWS)
        if field(job, RUNS_BODY) == 0:
            layers = 0
        blocks = (tokens + BLOCK_ROWS - 1) // BLOCK_ROWS
        by_rows = (tokens + _NORM_ROWS - 1) // _NORM_ROWS
        norms = by_rows if tokens > FEW else 0
        attend, store_pieces = field(job, ROWS) * kv_heads, 0
        if step == 0 and field(job, STORES_FIRST) != 0:
            attend = _attend_pieces(job, kv_heads, field(job, QUERY_TOKENS))
            store_pieces = _attend_pieces(job, kv_heads, _STORE_TOKENS)
        open_phase(phase, threads, tag, by_rows if layers > 0 else 0)
        phase += size
        for index in range(layers):
            layer = layer_table + 8 * LAYER_SIZE * index
            attends, has_mlp = 1, 1
            if skipped != 0:
                attends = 1 - get_int(skipped + 8 * index)
                has_mlp = 1 - get_int(skipped + 8 * (layers + index))
            whole = field(model, NORM_WHOLE) != 0 and field(layer, QUERY_NORM) != 0
            post_1, post_2 = field(layer, POST_NORM_1), field(layer, POST_NORM_2)
            wide = room // 64 * blocks
            open_phase(phase + _NORM_1 * size, threads, tag, attends * norms)
            open_phase(phase + _QKV * size, threads, tag, attends * (projected + 63) // 64 * blocks)
            open_phase(phase + _WHOLE_NORMS * size, threads, tag, attends * by_rows if whole else 0)
            open_phase(phase + _STORE * size, threads, tag, attends * store_pieces)
            open_phase(phase + _ATTEND * size, threads, tag, attends * attend)
            open_phase(phase + _OUT * size, threads, tag, attends * wide)
            open_phase(phase + _POST_1 * size, threads, tag, attends * by_rows if post_1 else 0)
            open_phase(phase + _NORM_2 * size, threads, tag, has_mlp * norms)
            mlp = field(model, MLP_GROUPS) * blocks
            open_phase(phase + _GATE_UP * size, threads, tag, has_mlp * mlp)
            open_phase(phase + _DOWN * size, threads, tag, has_mlp * wide)
            open_phase(phase + _POST_2 * size, threads, tag, has_mlp * by_rows if post_2 else 0)
            phase += LAYER_PHASES * size
        picked = field(job, NUM_PICKED)
        final = picked
        if layers > 0 and field(job, HIDDEN_OUT) != 0:
            final += tokens
        open_phase(phase + _FINAL * size, threads, tag, (final + _NORM_ROWS - 1) // _NORM_ROWS)
        groups = field(model, VOCABULARY_GROUPS) * ((picked + BLOCK_ROWS - 1) // BLOCK_ROWS)
        open_phase(phase + _HEAD * size, threads, tag, groups)
        open_phase(phase + _CHOOSE * size, threads, tag, 1 if picked > 0 else 0)
        phase += END_PHASES * size


def make_run(kernels: str, dtype: str, weights: str) -> Callable[..., Any]:
    """Return run(job, thread, tag), the part of one thread in a planned job.

    dtype: of the model. weights: `bfloat16`, `float32` or `int8`.
    """
    product = make_product(kernels, weights)
    rows_of = make_rows(weights)
    row_bytes, put_inputs, norm_to_inputs = rows_of
    norm_to_hidden, embed = make_rows(dtype).norm_to_inputs, make_embed(dtype == "bfloat16")
    store_keys, attend = make_attention(make_product(kernels, dtype), dtype, rows_of)
    size = 2 if dtype == "bfloat16" else 4  # bytes of a number of the model
    word = {"bfloat16": 2, "float32": 1, "int8": 4}[weights]  # inputs of a word
    scales = 256 if weights == "int8" else 0  # bytes of a group's scales, which follow it

    @compiled
    def norm_rows(job, model, norm, target, first, stop):
        """Norm rows of the stream into rows of inputs at `target`; without a norm, round them."""
        room, hidden = field(model, HIDDEN_ROOM), field(model, HIDDEN)
        eps = float_field(model, EPSILON_F)
        for row in range(first, stop):
            x = field(job, STREAM) + 4 * row * room
            to = target + (row - first) * row_bytes(room)
            if norm != 0:
                norm_to_inputs(x, norm, to, hidden, room, eps)
            else:
                for at in range(0, room, 32):
                    put_inputs(to, room, at, load(x + 4 * at), load(x + 4 * at + 64))

    @compiled
    def norm_phase(job, model, norm, phase, thread, tag):
        """Norm the stream into INPUTS, where there are too many tokens for every thread to do it."""
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            first = piece * _NORM_ROWS
            stop = min(field(job, TOKENS), first + _NORM_ROWS)
            room = field(model, HIDDEN_ROOM)
            target = field(job, INPUTS) + first * row_bytes(room)
            norm_rows(job, model, norm, target, first, stop)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def scale_rows(tile, factors, rows):
        """Multiply every row of a tile of sums by 64 numbers."""
        for at in range(0, 256, 64):
            numbers = load(factors + at)
            for row in range(rows):
                store(tile + 256 * row + at, load(tile + 256 * row + at) * numbers)

    @compiled
    def multiply(weights, words, x, x_stride, out, out_stride, tokens, groups, piece):
        """Compute one piece of a product; return (its group, its first token, its tokens)."""
        block, group = piece // groups, piece % groups
        first = block * BLOCK_ROWS
        rows = min(BLOCK_ROWS, tokens - first)
        at = weights + group * (4 * words * 64 + scales)
        product(
            at,
            words * 64,
            x + first * x_stride,
            x_stride,
            words,
            out,
            out_stride,
            1,
            rows,
        )
        if scales:
            scale_rows(out, at + 4 * words * 64, rows)
        return group, first, rows

    @compiled
    def add_bias(tile, bias, rows):
        """Add 64 numbers to every row of a tile of sums."""
        for at in range(0, 256, 64):
            numbers = load(bias + at)
            for row in range(rows):
                store(tile + 256 * row + at, load(tile + 256 * row + at) + numbers)

    @compiled
    def project(job, model, layer, phase, thread, tag):
        """Compute queries, keys and values."""
        threads = field(job, THREADS)
        is_normed = False
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            room, tokens = field(model, HIDDEN_ROOM), field(job, TOKENS)
            private = field(job, SCRATCH) + thread * field(job, SCRATCH_STRIDE)
            x, tile = field(job, INPUTS), private + ROOM_ROWS * 4 * room
            if tokens <= FEW:
                x = private
                if not is_normed:
                    norm_rows(job, model, field(layer, NORM_1), x, 0, tokens)
                    is_normed = True
            heads = field(model, HEADS) + 2 * field(model, KV_HEADS)
            outputs = heads * field(model, HEAD_ROOM)
            weights, groups = field(layer, QKV), (outputs + 63) // 64
            group, first, rows = multiply(
                weights, room // word, x, row_bytes(room), tile, 256, tokens, groups, piece
            )
            bias = field(layer, QKV_BIAS)
            if bias != 0:
                add_bias(tile, bias + 256 * group, rows)
            count = min(64, outputs - 64 * group)
            for row in range(rows):
                to = field(job, PROJECTED) + 4 * ((first + row) * outputs + 64 * group)
                for at in range(0, count, 16):
                    store(to + 4 * at, load(tile + 256 * row + 4 * at))
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def whole_norms(job, model, layer, phase, thread, tag):
        """Norm all queries and all keys of a token at once."""
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            head, d = field(model, HEAD_ROOM), field(model, HEAD_SIZE)
            heads, kv_heads = field(model, HEADS), field(model, KV_HEADS)
            eps = float_field(model, EPSILON_F)
            stop = min(field(job, TOKENS), (piece + 1) * _NORM_ROWS)
            for token in range(piece * _NORM_ROWS, stop):
                x = field(job, PROJECTED) + 4 * token * (heads + 2 * kv_heads) * head
                norm = field(layer, QUERY_NORM)
                norm_in_place(x, norm, heads * d, heads * head, eps)
                norm, x = field(layer, KEY_NORM), x + 4 * heads * head
                norm_in_place(x, norm, kv_heads * d, kv_heads * head, eps)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def find_piece(job, kv_heads, tokens, piece):
        """Return (span, head, first token) of a piece of at most `tokens` tokens of a row."""
        head, place = piece % kv_heads, piece // kv_heads
        span = field(job, SPANS)
        while True:
            parts = (field(span, WIDTH) + tokens - 1) // tokens
            if place < parts:
                return span, head, place * tokens
            place -= parts
            span += 8 * SPAN_SIZE

    @compiled
    def store_phase(job, model, layer, index, phase, thread, tag):
        """Cache the keys and values of rows that several pieces attend to."""
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            kv_heads = field(model, KV_HEADS)
            span, head, first = find_piece(job, kv_heads, _STORE_TOKENS, piece)
            stop = min(field(span, WIDTH), first + _STORE_TOKENS)
            store_keys(job, model, layer, span, head, first, stop, index)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def attend_phase(job, model, layer, index, phase, thread, tag):
        """Attend, by rows and key-value heads."""
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            kv_heads = field(model, KV_HEADS)
            stored = field(job, STORES_FIRST) != 0
            if stored:
                tokens = field(job, QUERY_TOKENS)
                span, head, first = find_piece(job, kv_heads, tokens, piece)
                stop = min(field(span, WIDTH), first + tokens)
            else:
                span = field(job, SPANS) + 8 * SPAN_SIZE * (piece // kv_heads)
                head, first, stop = piece % kv_heads, 0, field(span, WIDTH)
                store_keys(job, model, layer, span, head, first, stop, index)
            private = field(job, SCRATCH) + thread * field(job, SCRATCH_STRIDE)
            scratch = private + ROOM_ROWS * 4 * field(model, HIDDEN_ROOM) + TILE_BYTES
            attend(job, model, layer, span, head, first, stop, scratch, index)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def add_product(job, model, weights, bias, post, x, width, phase, thread, tag):
        """Add a product to the stream, or keep it in ADDED if a norm stands before.

        x: the job's field of the inputs. width: numbers of a row of inputs.
        """
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            room, tokens = field(model, HIDDEN_ROOM), field(job, TOKENS)
            private = field(job, SCRATCH) + thread * field(job, SCRATCH_STRIDE)
            tile = private + ROOM_ROWS * 4 * room
            inputs, stride, groups = field(job, x), row_bytes(width), room // 64
            group, first, rows = multiply(
                weights, width // word, inputs, stride, tile, 256, tokens, groups, piece
            )
            if bias != 0:
                add_bias(tile, bias + 256 * group, rows)
            factor = splat(float_field(model, RESIDUAL_SCALE_F))
            for row in range(rows):
                at = 4 * ((first + row) * room + 64 * group)
                target = field(job, ADDED if post != 0 else STREAM) + at
                for lanes in range(0, 256, 64):
                    numbers = load(tile + 256 * row + lanes)
                    if post == 0:
                        numbers = fma(numbers, factor, load(target + lanes))
                    store(target + lanes, numbers)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def add_normed_phase(job, model, norm, phase, thread, tag):
        """Add the norm of ADDED to the stream."""
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            room, hidden = field(model, HIDDEN_ROOM), field(model, HIDDEN)
            eps, factor = float_field(model, EPSILON_F), float_field(model, RESIDUAL_SCALE_F)
            stop = min(field(job, TOKENS), (piece + 1) * _NORM_ROWS)
            for row in range(piece * _NORM_ROWS, stop):
                at = 4 * row * room
                x = field(job, ADDED) + at
                add_normed(field(job, STREAM) + at, x, norm, hidden, room, eps, factor)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def gate_up(job, model, layer, phase, thread, tag):
        """Compute act(gate) * up; a group holds 32 numbers of each."""
        threads = field(job, THREADS)
        is_normed = False
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            room, tokens = field(model, HIDDEN_ROOM), field(job, TOKENS)
            private = field(job, SCRATCH) + thread * field(job, SCRATCH_STRIDE)
            x, tile = field(job, INPUTS), private + ROOM_ROWS * 4 * room
            if tokens <= FEW:
                x = private
                if not is_normed:
                    norm_rows(job, model, field(layer, NORM_2), x, 0, tokens)
                    is_normed = True
            groups, weights = field(model, MLP_GROUPS), field(layer, GATE_UP)
            group, first, rows = multiply(
                weights, room // word, x, row_bytes(room), tile, 256, tokens, groups, piece
            )
            bias, kind = field(layer, GATE_UP_BIAS), field(model, ACTIVATION)
            if bias != 0:
                add_bias(tile, bias + 256 * group, rows)
            for row in range(rows):
                to = field(job, ACTIVATED) + (first + row) * row_bytes(groups * 32)
                at = tile + 256 * row
                one = activate(load(at), kind) * load(at + 128)
                two = activate(load(at + 64), kind) * load(at + 192)
                put_inputs(to, 32 * groups, 32 * group, one, two)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def embed_phase(job, model, phase, thread, tag):
        """Read the tokens' embeddings into the stream."""
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            room, hidden = field(model, HIDDEN_ROOM), field(model, HIDDEN)
            scale = float_field(model, EMBEDDING_SCALE_F)
            stop = min(field(job, TOKENS), (piece + 1) * _NORM_ROWS)
            for token in range(piece * _NORM_ROWS, stop):
                number = get_int(field(job, IDS) + 8 * token)
                number = min(max(number, 0), field(model, VOCABULARY) - 1)
                source = field(model, EMBEDDING) + number * hidden * size
                embed(source, field(job, STREAM) + 4 * token * room, hidden, room, scale)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def final_phase(job, model, phase, thread, tag):
        """Norm all tokens into HIDDEN_OUT if it is wanted, and the picked places into INPUTS.

        Inputs are rounded from hidden states in the model's dtype, whether they leave the job or not.
        """
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            room, norm = field(model, HIDDEN_ROOM), field(model, FINAL_NORM)
            hidden, eps = field(model, HIDDEN), float_field(model, EPSILON_F)
            picked, out = field(job, NUM_PICKED), field(job, HIDDEN_OUT)
            runs_body = field(job, RUNS_BODY) != 0
            total = picked + (field(job, TOKENS) if out != 0 and runs_body else 0)
            private = field(job, SCRATCH) + thread * field(job, SCRATCH_STRIDE)
            for place in range(piece * _NORM_ROWS, min(total, (piece + 1) * _NORM_ROWS)):
                row = place - picked
                if place < picked:
                    row = get_int(field(job, PICKED) + 8 * place)
                source = out + size * row * room
                if runs_body:
                    source = private if place < picked else source
                    x = field(job, STREAM) + 4 * row * room
                    norm_to_hidden(x, norm, source, hidden, room, eps)
                if place < picked:
                    target = field(job, INPUTS) + place * row_bytes(room)
                    for at in range(0, room, 32):
                        if size == 2:
                            one, two = load_bf16(source + 2 * at), load_bf16(source + 2 * at + 32)
                        else:
                            one, two = load(source + 4 * at), load(source + 4 * at + 64)
                        put_inputs(target, room, at, one, two)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def note_best(tile, best, first_id, limit):
        """Write the largest of a row's 64 logits and its id; nan if any is nan."""
        largest, is_nan = splat(np.float32(-np.inf)), False
        for at in range(0, 64, 16):
            numbers = load(tile + 4 * at)
            if first_id + at + 16 > limit:
                for k in range(16):
                    if first_id + at + k >= limit:
                        put_f32(tile + 4 * (at + k), np.float32(-np.inf))
                numbers = load(tile + 4 * at)
            is_nan = is_nan or has_nan(numbers)
            largest = larger(numbers, largest)
        most = max_lanes(largest)
        if is_nan:
            most = np.float32(np.nan)
        put_f32(best, most)
        found = 0
        for at in range(48, -16, -16):
            same = lanes_equal(load(tile + 4 * at), splat(most))
            if same != 0:
                found = at + first_bit(same)
        put_int(best + 8, first_id + found)

    @compiled
    def head(job, model, phase, thread, tag):
        """Compute logits of the picked places, and each group's largest."""
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            room, picked = field(model, HIDDEN_ROOM), field(job, NUM_PICKED)
            private = field(job, SCRATCH) + thread * field(job, SCRATCH_STRIDE)
            x, tile = field(job, INPUTS), private + ROOM_ROWS * 4 * room
            groups = field(model, VOCABULARY_GROUPS)
            weights, bias = field(model, HEAD_WEIGHTS), field(model, HEAD_BIAS)
            group, first, rows = multiply(
                weights, room // word, x, row_bytes(room), tile, 256, picked, groups, piece
            )
            if bias != 0:
                add_bias(tile, bias + 256 * group, rows)
            scale, cap = float_field(model, LOGIT_SCALE_F), float_field(model, LOGIT_CAP_F)
            logits, limit = field(job, LOGITS), field(job, LIMIT)
            for row in range(rows):
                at = tile + 256 * row
                to = logits + 4 * ((first + row) * groups * 64 + group * 64)
                for lanes in range(0, 256, 64):
                    numbers = load(at + lanes) * splat(scale)
                    if cap != np.float32(0):
                        numbers = splat(cap) * tanh(numbers / splat(cap))
                    store(at + lanes, numbers)
                    if logits != 0:
                        store(to + lanes, numbers)
                best = field(job, BEST) + 16 * (group * picked + first + row)
                note_best(at, best, 64 * group, limit)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def choose(job, groups, place):
        """Return the id of the largest logit of a place, -1 if it is not finite."""
        picked = field(job, NUM_PICKED)
        best = field(job, BEST)
        most, found = get_f32(best + 16 * place), 0
        for group in range(1, groups):
            number = get_f32(best + 16 * (group * picked + place))
            if number != number:
                return -1
            if number > most:
                most, found = number, group
        if not abs(most) < np.float32(np.inf):
            return -1
        return get_int(best + 16 * (found * picked + place) + 8)

    @compiled
    def choose_phase(job, model, step, phase, thread, tag):
        """Choose the most likely ids; in a chain, make them the next step's tokens."""
        threads = field(job, THREADS)
        piece = claim(phase, threads, thread, tag)
        while piece >= 0:
            groups, steps = field(model, VOCABULARY_GROUPS), field(job, STEPS)
            for place in range(field(job, NUM_PICKED)):
                found = choose(job, groups, place)
                put_int(field(job, CHOICES) + 8 * place, found)
                if steps > 0:
                    put_int(field(job, CHAIN) + 8 * (place * steps + step), found)
            if steps > 0:
                for row in range(field(job, ROWS)):
                    span = field(job, SPANS) + 8 * SPAN_SIZE * row
                    start = field(span, START) + field(span, WIDTH)
                    put_field(span, START, start)
                    put_field(span, WIDTH, 1)
                    put_field(span, FIRST, row)
                    put_int(field(job, POSITIONS) + 8 * row, start)
                    put_int(field(job, PICKED) + 8 * row, row)
                    found = get_int(field(job, CHOICES) + 8 * row)
                    put_int(field(job, IDS) + 8 * row, max(0, found))
                put_field(job, TOKENS, field(job, ROWS))
                put_field(job, STORES_FIRST, 0)
            piece = finish(phase, threads, thread, tag)
        return piece != STALE and await_all(job, phase, tag)

    @compiled
    def run_layer(job, model, layer, index, phase, phase_size, thread, tag):
        """Run one layer's phases; return False if the job is over."""
        norm = field(layer, NORM_1)
        if not norm_phase(job, model, norm, phase + _NORM_1 * phase_size, thread, tag):
            return False
        if not project(job, model, layer, phase + _QKV * phase_size, thread, tag):
            return False
        at = phase + _WHOLE_NORMS * phase_size
        if not whole_norms(job, model, layer, at, thread, tag):
            return False
        if not store_phase(job, model, layer, index, phase + _STORE * phase_size, thread, tag):
            return False
        if not attend_phase(job, model, layer, index, phase + _ATTEND * phase_size, thread, tag):
            return False
        width = field(model, HEADS) * field(model, HEAD_ROOM)
        weights, bias = field(layer, OUT), field(layer, OUT_BIAS)
        post, at = field(layer, POST_NORM_1), phase + _OUT * phase_size
        if not add_product(job, model, weights, bias, post, ATTENDED, width, at, thread, tag):
            return False
        if not add_normed_phase(job, model, post, phase + _POST_1 * phase_size, thread, tag):
            return False
        norm = field(layer, NORM_2)
        if not norm_phase(job, model, norm, phase + _NORM_2 * phase_size, thread, tag):
            return False
        if not gate_up(job, model, layer, phase + _GATE_UP * phase_size, thread, tag):
            return False
        width = field(model, MLP_GROUPS) * 32
        weights, bias = field(layer, DOWN), field(layer, DOWN_BIAS)
        post, at = field(layer, POST_NORM_2), phase + _DOWN * phase_size
        if not add_product(job, model, weights, bias, post, ACTIVATED, width, at, thread, tag):
            return False
        return add_normed_phase(job, model, post, phase + _POST_2 * phase_size, thread, tag)

    @compiled
    def run_steps(job, thread, tag):
        model, threads = field(job, MODEL), field(job, THREADS)
        phase, phase_size = field(job, COUNTERS), phase_bytes(threads)
        layers = field(model, LAYERS) if field(job, RUNS_BODY) != 0 else 0
        layer_table = field(model, LAYER_TABLE)
        for step in range(max(1, field(job, STEPS))):
            if not embed_phase(job, model, phase, thread, tag):
                return
            phase += phase_size
            for index in range(layers):
                layer = layer_table + 8 * LAYER_SIZE * index
                if not run_layer(job, model, layer, index, phase, phase_size, thread, tag):
                    return
                phase += LAYER_PHASES * phase_size
            if not final_phase(job, model, phase + _FINAL * phase_size, thread, tag):
                return
            if not head(job, model, phase + _HEAD * phase_size, thread, tag):
                return
            if not choose_phase(job, model, step, phase + _CHOOSE * phase_size, thread, tag):
                return
            phase += END_PHASES * phase_size

    if kernels != "amx":
        return run_steps  # type: ignore[no-any-return]

    @compiled
    def run_with_tiles(job, thread, tag):
        configure_tiles(field(job, TILE_CONFIG))
        run_steps(job, thread, tag)
        release_tiles()

    return run_with_tiles  # type: ignore[no-any-return]
