"""The phases that read or write the residual stream: embeddings, norms, and what a layer adds.

The stream is float32. Inputs of products are rounded to the dtype of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from paceline.models.compiled.memory import field, float_field, get_int, load, store
from paceline.models.compiled.phases import FEW, NORM_ROWS
from paceline.models.compiled.products import ROOM_ROWS
from paceline.models.compiled.rows import Rows, add_normed, make_embed
from paceline.models.compiled.sharing import in_pieces
from paceline.models.compiled.tables import (
    ADDED,
    EMBEDDING,
    EMBEDDING_SCALE_F,
    EPSILON_F,
    HIDDEN,
    HIDDEN_ROOM,
    IDS,
    INPUTS,
    RESIDUAL_SCALE_F,
    STREAM,
    TOKENS,
    VOCABULARY,
)
from paceline.models.compiled.vectors import compiled, fma, splat

if TYPE_CHECKING:
    from collections.abc import Callable


class Norms(NamedTuple):
    """Norms of the stream into inputs of a product, compiled by numba.

    phase: norms all tokens into INPUTS; given: the address of the norm's weights, 0 for none.
    inputs_of(job, model, norm, private, is_first): the address of all tokens' inputs, which a thread
    norms into its scratch before its first piece where tokens are few.
    """

    phase: Callable[..., Any]
    inputs_of: Callable[..., Any]


def make_norms(rows: Rows) -> Norms:
    """Return the norms for one kind of inputs."""
    row_bytes, put_inputs, norm_to_inputs = rows

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
    def norm_piece(job, model, norm, private, piece, is_first):
        first = piece * NORM_ROWS
        stop = min(field(job, TOKENS), first + NORM_ROWS)
        target = field(job, INPUTS) + first * row_bytes(field(model, HIDDEN_ROOM))
        norm_rows(job, model, norm, target, first, stop)

    @compiled
    def inputs_of(job, model, norm, private, is_first):
        tokens = field(job, TOKENS)
        if tokens > FEW:
            return field(job, INPUTS)
        if is_first:
            norm_rows(job, model, norm, private, 0, tokens)
        return private

    return Norms(in_pieces(norm_piece), inputs_of)


@compiled
def tile_of(model, private):
    """Return the address of a piece's sums in a thread's scratch; normed inputs lie before it."""
    return private + ROOM_ROWS * 4 * field(model, HIDDEN_ROOM)


def make_embed_phase(dtype: str) -> Callable[..., Any]:
    """Return the phase that reads the tokens' embeddings, of `dtype`, into the stream; given: 0."""
    embed = make_embed(dtype == "bfloat16")
    size = 2 if dtype == "bfloat16" else 4  # bytes of a number

    @compiled
    def embed_piece(job, model, given, private, piece, is_first):
        room, hidden = field(model, HIDDEN_ROOM), field(model, HIDDEN)
        scale = float_field(model, EMBEDDING_SCALE_F)
        stop = min(field(job, TOKENS), (piece + 1) * NORM_ROWS)
        for token in range(piece * NORM_ROWS, stop):
            number = get_int(field(job, IDS) + 8 * token)
            number = min(max(number, 0), field(model, VOCABULARY) - 1)
            source = field(model, EMBEDDING) + number * hidden * size
            embed(source, field(job, STREAM) + 4 * token * room, hidden, room, scale)

    return in_pieces(embed_piece)


def make_add_product(multiply: Callable[..., Any], rows: Rows, word: int) -> Callable[..., Any]:
    """Return the phase that adds a product to the stream, or keeps it in ADDED for a norm before that.

    given: (weights, bias, the norm's weights or 0, inputs, numbers of a row of inputs), three of them
    addresses. word: inputs of a word.
    """
    row_bytes = rows.row_bytes

    @compiled
    def add_piece(job, model, given, private, piece, is_first):
        weights, bias, post, x, width = given
        room, tile = field(model, HIDDEN_ROOM), tile_of(model, private)
        stride, tokens = row_bytes(width), field(job, TOKENS)
        group, first, rows = multiply(
            weights, bias, width // word, x, stride, tile, tokens, room // 64, piece
        )
        factor = splat(float_field(model, RESIDUAL_SCALE_F))
        for row in range(rows):
            at = 4 * ((first + row) * room + 64 * group)
            target = field(job, ADDED if post != 0 else STREAM) + at
            for lanes in range(0, 256, 64):
                numbers = load(tile + 256 * row + lanes)
                if post == 0:
                    numbers = fma(numbers, factor, load(target + lanes))
                store(target + lanes, numbers)

    return in_pieces(add_piece)


@compiled
def _add_normed_piece(job, model, norm, private, piece, is_first):
    room, hidden = field(model, HIDDEN_ROOM), field(model, HIDDEN)
    eps, factor = float_field(model, EPSILON_F), float_field(model, RESIDUAL_SCALE_F)
    stop = min(field(job, TOKENS), (piece + 1) * NORM_ROWS)
    for row in range(piece * NORM_ROWS, stop):
        at = 4 * row * room
        add_normed(field(job, STREAM) + at, field(job, ADDED) + at, norm, hidden, room, eps, factor)


# adds the norm of ADDED to the stream; given: the address of the norm's weights
add_normed_phase = in_pieces(_add_normed_piece)
