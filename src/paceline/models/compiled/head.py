"""The phases after the layers: the final norm, the logits, and the choice of the most likely ids.

Symbols: P picked places, of which logits are wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.models.compiled.memory import (
    field,
    float_field,
    get_f32,
    get_int,
    load,
    load_bf16,
    put_atomic,
    put_f32,
    put_field,
    put_int,
    store,
)
from paceline.models.compiled.phases import NORM_ROWS
from paceline.models.compiled.race import note_winner
from paceline.models.compiled.residual import tile_of
from paceline.models.compiled.rows import Rows, make_rows, tanh
from paceline.models.compiled.sharing import in_pieces
from paceline.models.compiled.tables import (
    BEST,
    CHAIN,
    CHANCES,
    CHOICES,
    COLDNESS_F,
    DRAWN_AT,
    ENDING,
    EPSILON_F,
    FINAL_NORM,
    FIRST,
    HEAD_BIAS,
    HEAD_WEIGHTS,
    HIDDEN,
    HIDDEN_OUT,
    HIDDEN_ROOM,
    HOPE_F,
    IDS,
    INPUTS,
    LAYERS,
    LEAST_HOPE_F,
    LIMIT,
    LOGIT_CAP_F,
    LOGIT_SCALE_F,
    LOGITS,
    NUM_PICKED,
    PICKED,
    POSITIONS,
    ROWS,
    SPAN_SIZE,
    SPANS,
    START,
    STEPS,
    STREAM,
    SURENESS,
    TOKENS,
    VOCABULARY_GROUPS,
    WEIGHS,
    WIDTH,
)
from paceline.models.compiled.vectors import (
    compiled,
    exp,
    first_bit,
    has_nan,
    lanes_equal,
    larger,
    max_lanes,
    splat,
    sum_lanes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_NEGLIGIBLE: Final = np.float32(-20)  # logits so far below the largest have no weight


def make_final_norm(dtype: str, rows: Rows) -> Callable[..., Any]:
    """Return the phase that norms picked places into INPUTS, and all tokens into HIDDEN_OUT if wanted.

    Inputs are rounded from hidden states in `dtype`, the model's, whether they leave the job or not.
    rows: of the inputs of the head. given: 0.
    """
    row_bytes, put_inputs, _ = rows
    norm_to_hidden, size = make_rows(dtype).norm_to_inputs, 2 if dtype == "bfloat16" else 4

    @compiled
    def round_inputs(job, place, hidden, room):
        """Round a final hidden state at address `hidden` into the inputs of a place."""
        target = field(job, INPUTS) + place * row_bytes(room)
        for at in range(0, room, 32):
            if size == 2:
                one, two = load_bf16(hidden + 2 * at), load_bf16(hidden + 2 * at + 32)
            else:
                one, two = load(hidden + 4 * at), load(hidden + 4 * at + 64)
            put_inputs(target, room, at, one, two)

    @compiled
    def final_piece(job, model, given, private, piece, is_first):
        room, picked, out = (
            field(model, HIDDEN_ROOM),
            field(job, NUM_PICKED),
            field(job, HIDDEN_OUT),
        )
        norm, eps = field(model, FINAL_NORM), float_field(model, EPSILON_F)
        runs_body = field(job, LAYERS) != 0
        total = picked + (field(job, TOKENS) if out != 0 and runs_body else 0)
        for place in range(piece * NORM_ROWS, min(total, (piece + 1) * NORM_ROWS)):
            row = place - picked
            if place < picked:
                row = get_int(field(job, PICKED) + 8 * place)
            hidden = out + size * row * room
            if runs_body:
                hidden = private if place < picked else hidden
                x = field(job, STREAM) + 4 * row * room
                norm_to_hidden(x, norm, hidden, field(model, HIDDEN), room, eps)
            if place < picked:
                round_inputs(job, place, hidden, room)

    return in_pieces(final_piece)


@compiled
def _mask(tile, count):
    """Make all but the first `count` of 64 logits -inf."""
    for k in range(max(0, count), 64):
        put_f32(tile + 4 * k, np.float32(-np.inf))


@compiled
def _note_best(tile, best, first_id):
    """Write the largest of 64 logits and its id at `best`; nan if any is nan."""
    largest, is_nan = splat(np.float32(-np.inf)), False
    for at in range(0, 64, 16):
        numbers = load(tile + 4 * at)
        is_nan = is_nan or has_nan(numbers)
        largest = larger(numbers, largest)
    most = np.float32(np.nan) if is_nan else max_lanes(largest)
    put_f32(best, most)
    found = 0
    for at in range(48, -16, -16):
        same = lanes_equal(load(tile + 4 * at), splat(most))
        if same != 0:
            found = at + first_bit(same)
    put_int(best + 8, first_id + found)


@compiled
def _note_mass(tile, best):
    """Write next to the largest of 64 logits, at `best`, the sum of exp(logit - largest)."""
    most, mass = splat(get_f32(best)), splat(np.float32(0))
    for at in range(0, 64, 16):
        mass = mass + exp(load(tile + 4 * at) - most)
    # a group of which no id may be chosen has no largest logit
    put_f32(best + 4, sum_lanes(mass) if get_f32(best) > np.float32(-np.inf) else np.float32(0))


@compiled
def _scale_logits(model, tile, target):
    """Scale and cap 64 logits in place, and copy them to an address unless it is 0."""
    scale, cap = splat(float_field(model, LOGIT_SCALE_F)), float_field(model, LOGIT_CAP_F)
    for lanes in range(0, 256, 64):
        numbers = load(tile + lanes) * scale
        if cap != np.float32(0):
            numbers = splat(cap) * tanh(numbers / splat(cap))
        store(tile + lanes, numbers)
        if target != 0:
            store(target + lanes, numbers)


def make_head(multiply: Callable[..., Any], rows: Rows, word: int) -> Callable[..., Any]:
    """Return the phase that computes logits of the picked places, and each group's largest.

    word: inputs of a word. given: 0.
    """
    row_bytes = rows.row_bytes

    @compiled
    def head_piece(job, model, given, private, piece, is_first):
        room, picked, tile = (
            field(model, HIDDEN_ROOM),
            field(job, NUM_PICKED),
            tile_of(model, private),
        )
        weights, bias, groups = (
            field(model, HEAD_WEIGHTS),
            field(model, HEAD_BIAS),
            field(model, VOCABULARY_GROUPS),
        )
        x, stride = field(job, INPUTS), row_bytes(room)
        group, first, rows = multiply(
            weights, bias, room // word, x, stride, tile, picked, groups, piece
        )
        logits, best = field(job, LOGITS), field(job, BEST)
        for row in range(rows):
            at, place = tile + 256 * row, first + row
            to = logits + 4 * 64 * (place * groups + group) if logits != 0 else 0
            _scale_logits(model, at, to)
            _mask(at, field(job, LIMIT) - 64 * group)
            note = best + 16 * (group * picked + place)
            span = field(job, SPANS) + 8 * SPAN_SIZE * place
            if field(job, STEPS) > 0 and float_field(span, COLDNESS_F) > np.float32(0):
                note_winner(span, at, note, 64 * group)
            else:
                _note_best(at, note, 64 * group)
                if field(job, WEIGHS) != 0:
                    _note_mass(at, note)

    return in_pieces(head_piece)


@compiled
def _choose(job, groups, place):
    """Return the id of the largest logit of a place, -1 if it is not finite."""
    picked, best = field(job, NUM_PICKED), field(job, BEST)
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
def _sureness(job, groups, place):
    """Return the probability of the most likely id of a place, 0 if it is not finite."""
    picked, best = field(job, NUM_PICKED), field(job, BEST)
    most, mass = get_f32(best + 16 * place), np.float32(0)
    for group in range(1, groups):
        most = max(most, get_f32(best + 16 * (group * picked + place)))
    for group in range(groups):
        note = best + 16 * (group * picked + place)
        behind = get_f32(note) - most
        if behind > _NEGLIGIBLE:
            mass += get_f32(note + 4) * np.exp(behind)
    return np.float32(1) / mass if mass > np.float32(0) else np.float32(0)


@compiled
def _weigh(job, groups, place, step):
    """Note how sure a row's new token is; return whether its chain has ended."""
    span = field(job, SPANS) + 8 * SPAN_SIZE * place
    sure = _sureness(job, groups, place)
    put_f32(field(job, SURENESS) + 4 * (place * field(job, STEPS) + step), sure)
    at = min(int(sure * np.float32(CHANCES)), CHANCES - 1)
    hope = float_field(span, HOPE_F) * get_f32(field(job, ENDING) + 8 * (1 + at))
    put_f32(span + 8 * HOPE_F, hope)
    return hope < float_field(span, LEAST_HOPE_F)


@compiled
def _begin_step(job):
    """Make each row's chosen id the token of the next step of a chain."""
    for row in range(field(job, ROWS)):
        span = field(job, SPANS) + 8 * SPAN_SIZE * row
        start = field(span, START) + field(span, WIDTH)
        put_field(span, START, start)
        put_field(span, WIDTH, 1)
        put_field(span, FIRST, row)
        put_field(span, DRAWN_AT, field(span, DRAWN_AT) + 1)
        put_int(field(job, POSITIONS) + 8 * row, start)
        put_int(field(job, PICKED) + 8 * row, row)
        found = get_int(field(job, CHOICES) + 8 * row)
        put_int(field(job, IDS) + 8 * row, max(0, found))


@compiled
def _choose_piece(job, model, step, private, piece, is_first):
    steps, has_ended = field(job, STEPS), field(job, WEIGHS) != 0
    for place in range(field(job, NUM_PICKED)):
        found = _choose(job, field(model, VOCABULARY_GROUPS), place)
        put_int(field(job, CHOICES) + 8 * place, found)
        if steps > 0:
            put_int(field(job, CHAIN) + 8 * (place * steps + step), found)
        if field(job, WEIGHS) != 0:
            has_ended = _weigh(job, field(model, VOCABULARY_GROUPS), place, step) and has_ended
    if has_ended:
        put_atomic(field(job, ENDING), step + 1)
    if steps > 0:
        _begin_step(job)


# chooses the most likely ids; given: the step of a chain, whose ids it also keeps
choose_phase = in_pieces(_choose_piece)
