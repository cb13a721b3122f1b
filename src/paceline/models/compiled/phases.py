"""The phases of a forward, and the number of pieces of each.

A forward, or a step of a chain, is one phase to embed, eleven per layer and three for the logits; four
more of a layer attend to the source, and are neither opened nor run where a model has no encoder. Phases
that a model or a job does not need have no pieces. Products are split by groups of 64 outputs and blocks
of tokens, attention by rows and key-value heads, and operations on single rows by a few of them.
"""

from __future__ import annotations

from typing import Final

from paceline.models.compiled.memory import field, get_int
from paceline.models.compiled.products import BLOCK_ROWS
from paceline.models.compiled.sharing import open_phase, phase_bytes
from paceline.models.compiled.tables import (
    COUNTERS,
    CROSS_QUERY,
    HEAD_ROOM,
    HEADS,
    HIDDEN_OUT,
    HIDDEN_ROOM,
    KV_HEADS,
    LAYER_SIZE,
    LAYER_TABLE,
    LAYERS,
    MLP_GROUPS,
    MODEL,
    NORM_WHOLE,
    NUM_PICKED,
    POST_NORM_1,
    POST_NORM_2,
    QUERY_NORM,
    QUERY_TOKENS,
    ROWS,
    SKIPPED,
    SKIPS,
    SPAN_SIZE,
    SPANS,
    STEPS,
    STORES_FIRST,
    THREADS,
    TOKENS,
    VOCABULARY_GROUPS,
    WIDTH,
)
from paceline.models.compiled.vectors import compiled

# --- a layer's phases, in their order -------------------------------------------------------------
(
    NORM_1_PHASE,  # inputs of the product for queries, keys and values
    QKV_PHASE,
    WHOLE_NORMS_PHASE,  # of all queries or keys of a token at once
    STORE_PHASE,  # keys and values, where several pieces attend to one row's
    ATTEND_PHASE,
    OUT_PHASE,
    POST_1_PHASE,  # norm of what attention adds
    CROSS_NORM_PHASE,  # inputs of the product for queries to the source
    CROSS_QUERY_PHASE,
    CROSS_ATTEND_PHASE,
    CROSS_OUT_PHASE,
    NORM_2_PHASE,
    GATE_UP_PHASE,
    DOWN_PHASE,
    POST_2_PHASE,  # norm of what the MLP adds
    LAYER_PHASES,
) = range(16)
# --- after the layers -----------------------------------------------------------------------------
FINAL_PHASE, HEAD_PHASE, CHOOSE_PHASE, END_PHASES = range(4)

FEW: Final = 4  # tokens whose norms every thread computes for itself, which costs less than a phase
NORM_ROWS: Final = 4  # rows of a piece of row operations
STORE_TOKENS: Final = 64  # tokens of a piece that stores keys


def num_phases(layers: int, steps: int) -> int:
    """Return the phases of a job. steps: tokens of a chain, 0 without one."""
    return max(1, steps) * (1 + layers * LAYER_PHASES + END_PHASES)


@compiled
def pieces_of(number, unit):
    """Return the pieces of at most `unit` each."""
    return (number + unit - 1) // unit


@compiled
def find_piece(job, kv_heads, tokens, piece):
    """Return (span, head, first token) of a piece of at most `tokens` tokens of a row."""
    head, place = piece % kv_heads, piece // kv_heads
    span = field(job, SPANS)
    while True:
        parts = pieces_of(field(span, WIDTH), tokens)
        if place < parts:
            return span, head, place * tokens
        place -= parts
        span += 8 * SPAN_SIZE


@compiled
def _row_pieces(job, kv_heads, tokens):
    """Return the pieces of at most `tokens` tokens of a row and one head each."""
    pieces = 0
    for row in range(field(job, ROWS)):
        span = field(job, SPANS) + 8 * SPAN_SIZE * row
        pieces += pieces_of(field(span, WIDTH), tokens)
    return pieces * kv_heads


@compiled
def _plan_attention(model, layer, phase, threads, tag, tokens, store, attend):
    """Open the phases of a layer's attention. store, attend: pieces of those phases."""
    size, blocks, by_rows = (
        phase_bytes(threads),
        pieces_of(tokens, BLOCK_ROWS),
        pieces_of(tokens, NORM_ROWS),
    )
    outputs = (field(model, HEADS) + 2 * field(model, KV_HEADS)) * field(model, HEAD_ROOM)
    norms_whole = field(model, NORM_WHOLE) != 0 and field(layer, QUERY_NORM) != 0
    wide = field(model, HIDDEN_ROOM) // 64 * blocks
    open_phase(phase + NORM_1_PHASE * size, threads, tag, by_rows if tokens > FEW else 0)
    open_phase(phase + QKV_PHASE * size, threads, tag, pieces_of(outputs, 64) * blocks)
    open_phase(phase + WHOLE_NORMS_PHASE * size, threads, tag, by_rows if norms_whole else 0)
    open_phase(phase + STORE_PHASE * size, threads, tag, store)
    open_phase(phase + ATTEND_PHASE * size, threads, tag, attend)
    open_phase(phase + OUT_PHASE * size, threads, tag, wide)
    post = field(layer, POST_NORM_1)
    open_phase(phase + POST_1_PHASE * size, threads, tag, by_rows if post != 0 else 0)


@compiled
def _plan_cross(model, phase, threads, tag, tokens, attend):
    """Open the phases of a layer's attention to the source. attend: pieces of that phase."""
    size, blocks, by_rows = (
        phase_bytes(threads),
        pieces_of(tokens, BLOCK_ROWS),
        pieces_of(tokens, NORM_ROWS),
    )
    outputs = field(model, HEADS) * field(model, HEAD_ROOM)
    wide = field(model, HIDDEN_ROOM) // 64 * blocks
    open_phase(phase + CROSS_NORM_PHASE * size, threads, tag, by_rows if tokens > FEW else 0)
    open_phase(phase + CROSS_QUERY_PHASE * size, threads, tag, pieces_of(outputs, 64) * blocks)
    open_phase(phase + CROSS_ATTEND_PHASE * size, threads, tag, attend)
    open_phase(phase + CROSS_OUT_PHASE * size, threads, tag, wide)


@compiled
def _plan_mlp(model, layer, phase, threads, tag, tokens):
    """Open the phases of a layer's MLP."""
    size, blocks, by_rows = (
        phase_bytes(threads),
        pieces_of(tokens, BLOCK_ROWS),
        pieces_of(tokens, NORM_ROWS),
    )
    open_phase(phase + NORM_2_PHASE * size, threads, tag, by_rows if tokens > FEW else 0)
    open_phase(phase + GATE_UP_PHASE * size, threads, tag, field(model, MLP_GROUPS) * blocks)
    wide = field(model, HIDDEN_ROOM) // 64 * blocks
    open_phase(phase + DOWN_PHASE * size, threads, tag, wide)
    post = field(layer, POST_NORM_2)
    open_phase(phase + POST_2_PHASE * size, threads, tag, by_rows if post != 0 else 0)


@compiled
def _plan_nothing(phase, threads, tag, first, last):
    """Open phases first to last without pieces."""
    size = phase_bytes(threads)
    for number in range(first, last + 1):
        open_phase(phase + number * size, threads, tag, 0)


@compiled
def _plan_end(job, model, phase, threads, tag, tokens):
    """Open the phases after the layers. tokens: whose final hidden states are wanted."""
    size, picked = phase_bytes(threads), field(job, NUM_PICKED)
    open_phase(phase + FINAL_PHASE * size, threads, tag, pieces_of(picked + tokens, NORM_ROWS))
    groups = field(model, VOCABULARY_GROUPS) * pieces_of(picked, BLOCK_ROWS)
    open_phase(phase + HEAD_PHASE * size, threads, tag, groups)
    open_phase(phase + CHOOSE_PHASE * size, threads, tag, 1 if picked > 0 else 0)


@compiled
def plan(job, tag):
    """Open all phases of a job."""
    model, threads = field(job, MODEL), field(job, THREADS)
    layers = field(job, LAYERS)
    kv_heads = field(model, KV_HEADS)
    skipped = field(job, SKIPPED) if field(job, SKIPS) != 0 else 0
    size, phase = phase_bytes(threads), field(job, COUNTERS)
    for step in range(max(1, field(job, STEPS))):
        tokens = field(job, TOKENS) if step == 0 else field(job, ROWS)
        attend, store = field(job, ROWS) * kv_heads, 0
        if step == 0 and field(job, STORES_FIRST) != 0:
            attend = _row_pieces(job, kv_heads, field(job, QUERY_TOKENS))
            store = _row_pieces(job, kv_heads, STORE_TOKENS)
        open_phase(phase, threads, tag, pieces_of(tokens, NORM_ROWS) if layers > 0 else 0)
        phase += size
        for index in range(layers):
            layer = field(model, LAYER_TABLE) + 8 * LAYER_SIZE * index
            if skipped != 0 and get_int(skipped + 8 * index) != 0:
                _plan_nothing(phase, threads, tag, NORM_1_PHASE, CROSS_OUT_PHASE)
            else:
                _plan_attention(model, layer, phase, threads, tag, tokens, store, attend)
                if field(layer, CROSS_QUERY) != 0:
                    _plan_cross(model, phase, threads, tag, tokens, attend)
            if skipped != 0 and get_int(skipped + 8 * (layers + index)) != 0:
                _plan_nothing(phase, threads, tag, NORM_2_PHASE, POST_2_PHASE)
            else:
                _plan_mlp(model, layer, phase, threads, tag, tokens)
            phase += LAYER_PHASES * size
        wants_hidden = layers > 0 and field(job, HIDDEN_OUT) != 0
        _plan_end(job, model, phase, threads, tag, tokens if wants_hidden else 0)
        phase += END_PHASES * size
