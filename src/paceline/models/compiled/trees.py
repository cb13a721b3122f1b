"""Attention of a tree's tokens: each path is laid out as the chain that it may become.

So the bits of a token do not depend on where its ancestors lie among the drafted tokens. A path is int64
in memory: its length, then the places of its tokens in the tree, from the root on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.models.compiled.keys import UNIT, Heads, up_to
from paceline.models.compiled.memory import copy_half, copy_word, field, get_int, load, store
from paceline.models.compiled.products import ROOM_ROWS
from paceline.models.compiled.tables import (
    CAPACITY,
    FIRST,
    HEADS,
    KV_HEADS,
    PATHS,
    SCORE_ROOM,
    START,
    VALUE_ROOM,
    WIDTH,
)
from paceline.models.compiled.vectors import compiled, splat

if TYPE_CHECKING:
    from collections.abc import Callable


@compiled
def tail_room(width):
    """Return the positions of a tree's own values: less than a unit, and its longest path."""
    return up_to(UNIT + width, UNIT)


@compiled
def path_of(span, token):
    """Return the address of a token's path."""
    return field(span, PATHS) + 8 * token * (field(span, WIDTH) + 1)


@compiled
def shared_depth(path, other):
    """Return the number of leading tokens that two paths share."""
    both, same = min(get_int(path), get_int(other)), 0
    while same < both and get_int(path + 8 + 8 * same) == get_int(other + 8 + 8 * same):
        same += 1
    return same


@compiled
def order_scores(scores, path):
    """Move a path's scores to where those of a chain are. scores: float32, from the root's on."""
    for k in range(get_int(path)):
        place = get_int(path + 8 * (k + 1))
        copy_word(scores + 4 * k, scores + 4 * place)


def make_tree_sums(
    heads: Heads, sum_values: Callable[..., Any], put_outputs: Callable[..., Any]
) -> Callable[..., Any]:
    """Return attend_paths(job, model, span, head, first, stop, base, values, weights, sums, totals).

    It sums the values of tokens first to stop - 1 and writes their outputs. base: the first position
    with a weight. values, weights, sums, totals: addresses as in `attention.py`; scratch follows them.
    """
    word, size, input_size = heads.word, heads.size, heads.input_size
    half = word == 2

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
    def clear_values(target, words, value_room):
        """Zero all values of a tail."""
        zero = splat(np.float32(0))
        for at in range(value_room // 16 * words):
            store(target + at * 64, zero)

    @compiled
    def attend_paths(job, model, span, head, first, stop, base, values, weights, sums, totals):
        """Sum what is common to all paths once, and after it each path's own positions.

        Common are cached positions before the row's last whole unit. The others are laid out in a tail,
        again from where a path leaves the one before.
        """
        value_room = field(model, VALUE_ROOM)
        groups = field(model, HEADS) // field(model, KV_HEADS)
        start, room = field(span, START), tail_room(field(span, WIDTH))
        words, stride = field(span, CAPACITY) // word, 4 * field(job, SCORE_ROOM)
        rows, few = (stop - first) * groups, up_to(groups, ROOM_ROWS)
        own = up_to(totals + 4 * up_to(rows, ROOM_ROWS), 64)  # sums of one token's queries
        tail, tail_words = up_to(own + 4 * few * value_room, 64), room // word
        common = max(base, start // UNIT * UNIT)
        if common > base:
            sum_values(values, words, value_room, weights, stride, base, common, sums, 1, rows)
        clear_values(tail, tail_words, value_room)
        for at in range(common, start):
            copy_value(tail, tail_words, at - common, values, words, at, value_room)
        for token in range(first, stop):
            path, row = path_of(span, token), (token - first) * groups
            depth = get_int(path)
            same = shared_depth(path, path_of(span, token - 1)) if token > first else 0
            for k in range(same, depth):
                place, at = start + get_int(path + 8 + 8 * k), start - common + k
                copy_value(tail, tail_words, at, values, words, place, value_room)
            for at in range(0, groups * value_room, 16):
                store(own + 4 * at, load(sums + 4 * (row * value_room + at)))
            top, fresh = up_to(start - common + depth, UNIT), 0 if common > base else 1
            at = weights + row * stride + common * input_size
            sum_values(tail, tail_words, value_room, at, stride, 0, top, own, fresh, groups)
            packed = field(span, FIRST) + token
            put_outputs(job, model, packed, head, own, totals + 4 * row)

    return attend_paths
