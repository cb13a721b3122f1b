"""A suffix automaton of token ids in flat arrays, grown token by token: the compiled loops.

The module knows no rows and no drafters. `SuffixIndex` owns the arrays, which this module never
allocates. `SuffixIndex` imports it only when needed, because numba takes a second to import.

A state is the set of all strings that end at the same places of the text; its link is the longest of
its suffixes that ends at more places. n tokens have at most 2n states and 3n edges (Blumer et al.,
1985). Only contexts of up to MAX_MATCH tokens are counted. A string is counted when a token follows it,
together with all its suffixes, so a token costs at most MAX_MATCH steps in any text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from paceline.compiled import compiled
from paceline.noise.kernels import mix

if TYPE_CHECKING:
    from collections.abc import Callable

    Automaton = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# numba compiles a function again for every width of its integers, so values read become int64
wide = cast("Callable[[Any], int]", np.int64)

# header  [7] int64
NUM_TOKENS, NUM_STATES, NUM_EDGES, WHOLE, CONTEXT, CONTEXT_LENGTH, MAX_MATCH = range(7)
# states  [S, 5] int32: longest string, link, first edge; count of tokens that followed, latest place
LENGTH, LINK, FIRST, FOLLOWED, SOURCE = range(5)
# edges  [E, 6] int32: a state's edges are a list, the latest in front; count of uses
OWNER, TOKEN, TARGET, NEXT, PREVIOUS, COUNT = range(6)
# table  [power of two] int32: edges by owner and token, -1 where free; open addressing

ROOT: Final = 0
# a context's latest distinct continuations are considered, up to this number, which bounds a round
SCANNED: Final = 32
# candidates of a tree  [C, 7] int32
_TOKEN, _PARENT, _STATE, _LENGTH, _LEVEL, _NEXT, _EVIDENCE = range(7)


# --- edges ----------------------------------------------------------------------------------------


@compiled
def _place(table: np.ndarray, owner: int, token: int) -> int:
    """Return the place at which the search for an edge starts."""
    key = np.uint64(owner) << np.uint64(32) ^ np.uint64(np.uint32(token))
    return wide(mix(key) & np.uint64(len(table) - 1))


@compiled
def _find(edges: np.ndarray, table: np.ndarray, owner: int, token: int) -> int:
    """Return the edge of a state by a token, -1 if there is none."""
    place = _place(table, owner, token)
    while True:
        edge = wide(table[place])
        if edge < 0 or (edges[edge, OWNER] == owner and edges[edge, TOKEN] == token):
            return edge
        place = (place + 1) & (len(table) - 1)


@compiled
def _enter(edges: np.ndarray, table: np.ndarray, edge: int) -> None:
    place = _place(table, edges[edge, OWNER], edges[edge, TOKEN])
    while table[place] >= 0:
        place = (place + 1) & (len(table) - 1)
    table[place] = edge


@compiled
def rehash(edges: np.ndarray, num_edges: int, table: np.ndarray) -> None:
    """Enter all edges into an empty table."""
    for edge in range(num_edges):
        _enter(edges, table, edge)


@compiled
def _to_front(states: np.ndarray, edges: np.ndarray, edge: int) -> None:
    """Put an edge that is in no list in front of its owner's list."""
    owner = edges[edge, OWNER]
    first = states[owner, FIRST]
    edges[edge, PREVIOUS] = -1
    edges[edge, NEXT] = first
    if first >= 0:
        edges[first, PREVIOUS] = edge
    states[owner, FIRST] = edge


@compiled
def _add_edge(automaton: Automaton, owner: int, token: int, target: int, count: int) -> None:
    header, states, edges, table = automaton
    edge = header[NUM_EDGES]
    header[NUM_EDGES] += 1
    edges[edge, OWNER] = owner
    edges[edge, TOKEN] = token
    edges[edge, TARGET] = target
    edges[edge, COUNT] = count
    _to_front(states, edges, edge)
    _enter(edges, table, edge)


@compiled
def _take(states: np.ndarray, edges: np.ndarray, edge: int) -> None:
    """Count an edge once more and put it in front."""
    edges[edge, COUNT] += 1
    previous, following = edges[edge, PREVIOUS], edges[edge, NEXT]
    if previous < 0:
        return
    edges[previous, NEXT] = following
    if following >= 0:
        edges[following, PREVIOUS] = previous
    _to_front(states, edges, edge)


# --- growth ---------------------------------------------------------------------------------------


@compiled
def _new_state(header: np.ndarray, states: np.ndarray, length: int) -> int:
    state = header[NUM_STATES]
    header[NUM_STATES] += 1
    states[state, LENGTH] = length
    states[state, LINK] = ROOT
    states[state, FIRST] = -1
    states[state, FOLLOWED] = 0
    states[state, SOURCE] = -1
    return wide(state)


@compiled
def clear(automaton: Automaton) -> None:
    """Make the text empty. The table must be all -1."""
    header, states, _, _ = automaton
    header[:MAX_MATCH] = 0
    states[_new_state(header, states, 0), LINK] = -1


@compiled
def extend(automaton: Automaton, tokens: np.ndarray) -> None:
    """Append tokens [n] int32 to the text. The arrays must have room for them."""
    for i in range(len(tokens)):
        _append(automaton, tokens[i])


@compiled
def _append(automaton: Automaton, token: int) -> None:
    header, states, edges, table = automaton
    whole = header[WHOLE]
    new = _new_state(header, states, states[whole, LENGTH] + 1)
    # suffixes that this token never followed before, from the longest on
    known = whole
    edge = _find(edges, table, known, token)
    while edge < 0:
        _add_edge(automaton, known, token, new, 1)
        known = wide(states[known, LINK])
        if known < 0:
            break
        edge = _find(edges, table, known, token)
    if known >= 0:
        states[new, LINK] = _class_of(automaton, known, token, edge, new)
    _count(automaton, token, states[known, LENGTH] if known >= 0 else -1)
    # if the context's own state was split, the context repeats this token and its edge leads to `new`;
    # `_bounded` moves it from there to the half that now holds the context
    edge = _find(edges, table, header[CONTEXT], token)
    header[CONTEXT], header[CONTEXT_LENGTH] = _bounded(
        states, edges[edge, TARGET], header[CONTEXT_LENGTH] + 1, header[MAX_MATCH]
    )
    header[WHOLE] = new
    header[NUM_TOKENS] += 1


@compiled
def _class_of(automaton: Automaton, known: int, token: int, edge: int, new: int) -> int:
    """Return the state of `known`'s longest string plus the token, splitting a state if needed."""
    header, states, edges, table = automaton
    target = wide(edges[edge, TARGET])
    length = states[known, LENGTH] + 1
    if states[target, LENGTH] == length:
        return target
    clone = _new_state(header, states, length)
    states[clone, LINK] = states[target, LINK]
    states[clone, FOLLOWED] = states[target, FOLLOWED]
    states[clone, SOURCE] = states[target, SOURCE]
    states[target, LINK] = clone
    # the list is copied from its end, since each copy goes to the front
    copied = wide(states[target, FIRST])
    while copied >= 0 and edges[copied, NEXT] >= 0:
        copied = wide(edges[copied, NEXT])
    while copied >= 0:
        _add_edge(
            automaton, clone, edges[copied, TOKEN], edges[copied, TARGET], edges[copied, COUNT]
        )
        copied = wide(edges[copied, PREVIOUS])
    while known >= 0:
        edge = _find(edges, table, known, token)
        if edges[edge, TARGET] != target:
            break
        edges[edge, TARGET] = clone
        known = wide(states[known, LINK])
    return clone


@compiled
def _count(automaton: Automaton, token: int, num_known: int) -> None:
    """Count that the token followed the context and its suffixes.

    num_known: length up to which it followed them earlier; longer ones have a new edge.
    """
    header, states, edges, table = automaton
    state = header[CONTEXT]
    while state != ROOT:
        states[state, FOLLOWED] += 1
        states[state, SOURCE] = header[NUM_TOKENS]
        if states[state, LENGTH] <= num_known:
            _take(states, edges, _find(edges, table, state, token))
        state = wide(states[state, LINK])


@compiled
def _bounded(states: np.ndarray, state: int, length: int, max_match: int) -> tuple[int, int]:
    """Return the state of the last `max_match` tokens of a string at most one token longer."""
    if length > max_match:
        length = max_match
        if states[states[state, LINK], LENGTH] >= max_match:
            state = wide(states[state, LINK])
    return wide(state), wide(length)


# --- matches --------------------------------------------------------------------------------------


@compiled
def _followed(states: np.ndarray, state: int, length: int) -> tuple[int, int]:
    """Return the longest suffix of a string that some token followed; the root if there is none."""
    while state != ROOT and states[state, FOLLOWED] == 0:
        state = wide(states[state, LINK])
        length = min(length, wide(states[state, LENGTH]))
    return wide(state), wide(length)


@compiled
def extend_and_match(
    automaton: Automaton, tokens: np.ndarray, first: int, last: int
) -> tuple[int, int, int]:
    """Append tokens[first:last] int32 to the text, for which the arrays must have room.

    Return the longest suffix of the text that occurs earlier: state, length, the token after it.
    """
    for i in range(first, last):
        _append(automaton, tokens[i])
    header, states, _, _ = automaton
    state, length = _followed(states, header[CONTEXT], header[CONTEXT_LENGTH])
    return state, length, wide(states[state, SOURCE])


@compiled
def match(automaton: Automaton, tokens: np.ndarray) -> tuple[int, int]:
    """Return the longest suffix of other tokens [n <= MAX_MATCH] in this text: state, length."""
    _, states, edges, table = automaton
    state, length = wide(ROOT), wide(0)
    for i in range(len(tokens)):
        edge = _find(edges, table, state, tokens[i])
        while edge < 0 and state != ROOT:
            state = wide(states[state, LINK])
            length = wide(states[state, LENGTH])
            edge = _find(edges, table, state, tokens[i])
        if edge >= 0:
            state, length = wide(edges[edge, TARGET]), length + 1
    return _followed(states, state, length)


@compiled
def evidence_of(length: int, total: int, count: int) -> int:
    """Return the evidence class of a continuation, below NUM_EVIDENCE.

    length: tokens of the context. total: tokens that followed it so far; count: those that were the
    continuation. The class has 3 bits for the length, 2 for the total and 2 for the share count / total.
    """
    if length < 5:
        by_length = max(length, 1) - 1  # 1, 2, 3, 4
    elif length < 10:
        by_length = 4 if length < 7 else 5
    else:
        by_length = 6 if length < 16 else 7
    by_total = min(total, 3) - 1 if total < 6 else 3  # 1, 2, 3 to 5, 6 or more
    if count == total:
        by_share = 3
    elif 10 * count >= 7 * total:
        by_share = 2
    else:
        by_share = 1 if 10 * count >= 4 * total else 0
    return wide(16 * by_length + 4 * by_total + by_share)


@compiled
def grow(
    automaton: Automaton,
    state: int,
    length: int,
    min_match: int,
    depth: int,
    paths: int,
    min_probability: float,
    tokens: np.ndarray,
    parents: np.ndarray,
    evidence: np.ndarray,
) -> tuple[int, int, float]:
    """Write the likeliest continuations of a context as a tree.

    Into tokens and parents [K] int64, and the class of each token's evidence [K] int64. Returns the
    number of nodes, of leaves and of expected accepted tokens, the sum of the nodes' probabilities.
    Equally likely nodes are in the order of their parents, then the latest first.
    """
    header, states, edges, _ = automaton
    most = len(tokens)
    fields = np.empty(((most + 1) * SCANNED, 7), dtype=np.int32)
    probabilities = np.empty(len(fields))
    has_child = np.zeros(most + 1, dtype=np.bool_)  # of node k at k + 1
    num_candidates, num_nodes, leaves, expected = 0, 0, 0, 0.0
    best = wide(-1)  # the first of the open candidates, a list in falling order
    node, level, probability = -1, 0, 1.0
    while True:
        state, length = _followed(states, state, length)
        if level < depth and length >= min_match:
            edge = wide(states[state, FIRST])
            total = states[state, FOLLOWED]
            scanned = 0
            while edge >= 0 and scanned < SCANNED:
                p = probability * (edges[edge, COUNT] / total)
                # below 0 is the end of one text among several, no token
                if p >= min_probability and edges[edge, TOKEN] >= 0:
                    new = fields[num_candidates]
                    new[_TOKEN], new[_PARENT], new[_LEVEL] = edges[edge, TOKEN], node, level + 1
                    new[_EVIDENCE] = evidence_of(length, total, edges[edge, COUNT])
                    new[_STATE], new[_LENGTH] = _bounded(
                        states, edges[edge, TARGET], length + 1, header[MAX_MATCH]
                    )
                    probabilities[num_candidates] = p
                    best = _insert(fields, probabilities, best, num_candidates)
                    num_candidates += 1
                edge = wide(edges[edge, NEXT])
                scanned += 1
        while best >= 0:
            parent = fields[best, _PARENT]
            opens = has_child[parent + 1] or leaves == 0
            if not opens or leaves < paths:
                break
            best = wide(fields[best, _NEXT])
        if best < 0 or num_nodes == most:
            return num_nodes, leaves, expected
        leaves += opens
        has_child[parent + 1] = True
        tokens[num_nodes], parents[num_nodes] = fields[best, _TOKEN], parent
        evidence[num_nodes] = fields[best, _EVIDENCE]
        node, level, probability = num_nodes, wide(fields[best, _LEVEL]), probabilities[best]
        state, length = wide(fields[best, _STATE]), wide(fields[best, _LENGTH])
        expected += probability
        num_nodes += 1
        best = wide(fields[best, _NEXT])


@compiled
def expected_tokens(
    parents: np.ndarray, evidence: np.ndarray, num_nodes: int, chances: np.ndarray
) -> float:
    """Return the number of a draft's tokens that are expected to be accepted.

    parents, evidence: [>= num_nodes]. chances: by class, of a token whose parent is accepted.
    """
    along = np.empty(num_nodes)
    expected = 0.0
    for node in range(num_nodes):
        along[node] = chances[evidence[node]]
        if parents[node] >= 0:
            along[node] *= along[parents[node]]
        expected += along[node]
    return expected


@compiled
def _insert(fields: np.ndarray, probabilities: np.ndarray, best: int, new: int) -> int:
    """Insert a candidate after all that are at least as likely; return the list's first."""
    previous, following = wide(-1), best
    while following >= 0 and probabilities[following] >= probabilities[new]:
        previous, following = following, wide(fields[following, _NEXT])
    fields[new, _NEXT] = following
    if previous < 0:
        return new
    fields[previous, _NEXT] = new
    return best
