"""Lookup of contexts in the index of a collection's answers, and the tree of their continuations: the
compiled loops.

The arrays are those of `store.answers`. Contexts are sorted, so all places with a context are a range of
ranks, which binary search finds. Left out are the ranks of some answers' places: every loop sees the
index as if it had been built without those answers. Nothing is read outside the arrays, whatever they
contain. Symbols: N tokens, X left-out ranks, n tokens of a row's end.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from paceline.compiled import compiled
from paceline.drafting.evidence import NUM_EVIDENCE
from paceline.drafting.suffix_kernels import evidence_of, wide
from paceline.store.contexts import MAX_CONTEXT

FOLLOWED: Final = 64
"""Maximum number of occurrences of a context that are followed, which bounds a round."""

# candidates of a tree  [C, 8] int64; the occurrences of each are a list
_TOKEN, _PARENT, _LEVEL, _FIRST, _LAST, _COUNT, _NEXT, _EVIDENCE = range(8)


# --- contexts -------------------------------------------------------------------------------------


@compiled
def _place(order: np.ndarray, left_out: np.ndarray, rank: int) -> int:
    """Return the place of a rank, counted without the left-out ranks [X], which are sorted."""
    low, high = 0, len(left_out)
    while low < high:
        middle = (low + high) // 2
        if left_out[middle] - middle <= rank:
            low = middle + 1
        else:
            high = middle
    place = wide(order[rank + low])
    return wide(min(max(place, 0), len(order) - 1))


@compiled
def _before(tokens: np.ndarray, place: int, distance: int) -> int:
    """Return the token this far before a place, -1 where the context has ended."""
    at = place - 1 - distance
    return wide(tokens[at]) if at >= 0 else wide(-1)


@compiled
def _in_common(tokens: np.ndarray, place: int, suffix: np.ndarray, most: int) -> int:
    """Return the number of last tokens of `suffix` that precede a place, at most `most`."""
    for distance in range(most):
        if _before(tokens, place, distance) != suffix[len(suffix) - 1 - distance]:
            return distance
    return most


@compiled
def _find(
    tokens: np.ndarray, order: np.ndarray, left_out: np.ndarray, suffix: np.ndarray, most: int
) -> tuple[int, int, int]:
    """Return the longest end of `suffix` [n], at most `most` tokens, that precedes some place.

    Return its length and the first and last rank (exclusive) of the places, counted without left-out
    ranks.
    """
    num_ranks = len(order) - len(left_out)
    most = min(most, len(suffix), MAX_CONTEXT)
    low, high = 0, num_ranks
    while low < high:  # the first context that does not precede the suffix
        middle = (low + high) // 2
        place = _place(order, left_out, middle)
        common = _in_common(tokens, place, suffix, most)
        if common < most and _before(tokens, place, common) < suffix[len(suffix) - 1 - common]:
            low = middle + 1
        else:
            high = middle
    # the longest match is next to it
    length = 0
    for rank in (low - 1, low):
        if 0 <= rank < num_ranks:
            place = _place(order, left_out, rank)
            length = max(length, _in_common(tokens, place, suffix, most))
    if length == 0:
        return 0, 0, 0
    first = _edge(tokens, order, left_out, suffix, length, low, -1)
    last = _edge(tokens, order, left_out, suffix, length, low - 1, 1)
    return length, first, last


@compiled
def _edge(
    tokens: np.ndarray,
    order: np.ndarray,
    left_out: np.ndarray,
    suffix: np.ndarray,
    length: int,
    rank: int,
    step: int,
) -> int:
    """Return the end of the range of a match that starts next to a rank: downward the first rank that
    matches (step -1), upward the one after the last (step 1).
    """
    num_ranks = len(order) - len(left_out)
    inside, jump = rank, 1
    while True:
        outside = inside + step * jump
        if outside < 0 or outside >= num_ranks:
            outside = -1 if step < 0 else num_ranks
            break
        place = _place(order, left_out, outside)
        if _in_common(tokens, place, suffix, length) < length:
            break
        inside, jump = outside, 2 * jump
    while abs(outside - inside) > 1:
        middle = (outside + inside) // 2
        place = _place(order, left_out, middle)
        if _in_common(tokens, place, suffix, length) < length:
            outside = middle
        else:
            inside = middle
    return inside if step < 0 else outside


@compiled
def occurrences(
    tokens: np.ndarray, order: np.ndarray, left_out: np.ndarray, suffix: np.ndarray
) -> np.ndarray:
    """Return the places [.] int64 that all of `suffix` [n] precedes, without left-out ones.

    suffix: at most MAX_CONTEXT tokens.
    """
    length, first, last = _find(tokens, order, left_out, suffix, len(suffix))
    if length < len(suffix):
        last = first
    places = np.empty(last - first, dtype=np.int64)
    for i in range(len(places)):
        places[i] = _place(order, left_out, first + i)
    return places


@compiled
def ranks_of(
    tokens: np.ndarray, order: np.ndarray, first_place: int, last_place: int
) -> np.ndarray:
    """Return the ranks [last_place - first_place] int64 of consecutive places."""
    ranks = np.empty(last_place - first_place, dtype=np.int64)
    for i in range(len(ranks)):
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if _precedes(tokens, order[middle], first_place + i):
                low = middle + 1
            else:
                high = middle
        ranks[i] = low
    return ranks


@compiled
def _precedes(tokens: np.ndarray, place: int, other: int) -> bool:
    """Return whether a place is sorted before another: by context, then by place."""
    for distance in range(MAX_CONTEXT):
        mine, others = _before(tokens, place, distance), _before(tokens, other, distance)
        if mine != others:
            return mine < others
        if mine < 0:
            break
    return place < other


# --- trees ----------------------------------------------------------------------------------------


@compiled
def match_and_grow(
    tokens: np.ndarray,
    order: np.ndarray,
    left_out: np.ndarray,
    suffix: np.ndarray,
    min_match: int,
    length_factor: float,
    length_offset: float,
    depth: int,
    paths: int,
    min_probability: float,
    worth: float,
    out: np.ndarray,
    row: int,
) -> tuple[int, int, float]:
    """Write the likeliest continuations of a row's end as a tree.

    suffix: the last tokens [n] int32 of the row, as many as may match. Into out[:, row] [3, R, K] int64:
    tokens, parents and evidence, whose classes are NUM_EVIDENCE and more. Nothing is written if the
    match allows no more tokens than `worth`. Returns the number of nodes, of leaves and of expected
    accepted tokens. The rules are those of `suffix_kernels.grow`; of equally likely nodes of one
    parent, the one with the longer or later context comes first.
    """
    length, first, last = _find(tokens, order, left_out, suffix, len(suffix))
    longest = length_factor * length + length_offset
    most = out.shape[2] if longest >= out.shape[2] else wide(max(longest, 0.0))
    if length < min_match or length == 0 or most <= worth:
        return 0, 0, 0.0
    count = min(last - first, FOLLOWED)
    places = np.empty(count, dtype=np.int64)
    following = np.empty(count, dtype=np.int64)  # the next occurrence of the same candidate
    for i in range(count):
        # evenly spaced, the last one first
        rank = last - 1 - (i * (last - first)) // count
        places[i] = _place(order, left_out, rank)
        following[i] = i + 1 if i + 1 < count else -1
    fields = np.empty((count * (most + 1), 8), dtype=np.int64)
    probabilities = np.empty(len(fields))
    has_child = np.zeros(most + 1, dtype=np.bool_)  # of node k at k + 1
    num_candidates, num_nodes, leaves, expected = 0, 0, 0, 0.0
    best = -1  # the first of the open candidates, a list in falling order
    node, level, probability, occurrence = -1, 0, 1.0, 0
    while True:
        if level < depth:
            begin = num_candidates
            num_candidates = _branch(tokens, places, following, occurrence, fields, begin)
            for candidate in range(begin, num_candidates):
                new = fields[candidate]
                p = probability * (new[_COUNT] / count)
                if p >= min_probability:
                    new[_PARENT], new[_LEVEL] = node, level + 1
                    new[_EVIDENCE] = NUM_EVIDENCE + evidence_of(length + level, count, new[_COUNT])
                    probabilities[candidate] = p
                    best = _insert(fields, probabilities, best, candidate)
        opens = False
        while best >= 0:
            opens = has_child[fields[best, _PARENT] + 1] or leaves == 0
            if not opens or leaves < paths:
                break
            best = fields[best, _NEXT]
        if best < 0 or num_nodes == most:
            return num_nodes, leaves, expected
        taken = fields[best]
        leaves += opens
        has_child[taken[_PARENT] + 1] = True
        out[0, row, num_nodes], out[1, row, num_nodes] = taken[_TOKEN], taken[_PARENT]
        out[2, row, num_nodes] = taken[_EVIDENCE]
        node, level, probability = num_nodes, taken[_LEVEL], probabilities[best]
        occurrence, count = taken[_FIRST], taken[_COUNT]
        expected += probability
        num_nodes += 1
        best = taken[_NEXT]


@compiled
def _branch(
    tokens: np.ndarray,
    places: np.ndarray,
    following: np.ndarray,
    occurrence: int,
    fields: np.ndarray,
    begin: int,
) -> int:
    """Move a node's occurrences on by one token, to a candidate per token; return the end of these.

    occurrence: the first one of the node. begin: the first free candidate.
    """
    end = begin
    while occurrence >= 0:
        next_one, place = following[occurrence], places[occurrence]
        token = wide(tokens[place]) if place < len(tokens) else wide(-1)
        if token >= 0:  # the end of an answer has no continuation
            candidate = begin
            while candidate < end and fields[candidate, _TOKEN] != token:
                candidate += 1
            if candidate == end:
                end += 1
                fields[candidate, _TOKEN], fields[candidate, _COUNT] = token, 0
                fields[candidate, _FIRST] = occurrence
            else:
                following[fields[candidate, _LAST]] = occurrence
            fields[candidate, _LAST] = occurrence
            fields[candidate, _COUNT] += 1
            following[occurrence] = -1
            places[occurrence] = place + 1
        occurrence = next_one
    return end


@compiled
def _insert(fields: np.ndarray, probabilities: np.ndarray, best: int, new: int) -> int:
    """Insert a candidate after all that are at least as likely; return the list's first."""
    previous, following = -1, best
    while following >= 0 and probabilities[following] >= probabilities[new]:
        previous, following = following, fields[following, _NEXT]
    fields[new, _NEXT] = following
    if previous < 0:
        return new
    fields[previous, _NEXT] = new
    return best
