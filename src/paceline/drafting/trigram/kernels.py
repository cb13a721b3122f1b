"""Learning tri-grams from a row's text and searching them for a draft, on flat arrays, compiled.

`reference.py` says the same in plain Python and gives the same trees. All in one module, for the sake
of the compiled code's cache. After ADED (arXiv 2407.12021) and its released code; what differs from
these is in docs/drafters/trigram_tree.md.

Words: a *pair* is two neighbouring tokens, its *successors* are what may follow; the *table* is read
only, the *overlay* is what was learned on top of it; *weights* are probabilities, except under the
released update rule, which lets them grow up to a cap.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from paceline.drafting.compiled import compiled
from paceline.drafting.trigram.table import MAX_SUCCESSORS, Table

RELEASED: Final = 1  # update rules
COUNTS: Final = 2
MCTS: Final = 0  # searches
GREEDY: Final = 1
FULL: Final = 2

_EMPTY: Final = -1
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64, as in paceline.noise
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
_STREAM: Final = np.uint64(4)  # of random numbers; the others are in paceline.noise


class Rule(NamedTuple):
    """How text changes the overlay; the numbers are explained in the drafter's settings."""

    kind: int
    step: float
    cap: float
    decay: float
    prior: float


class Overlay(NamedTuple):
    """C pairs with room for S = MAX_SUCCESSORS successors each, found through a hash of H places."""

    places: (
        np.ndarray
    )  # [H] int32, the pair at a place of the hash; H is a power of two, at least 2 C
    keys: np.ndarray  # [C] int64, the pair's two tokens
    sizes: np.ndarray  # [C] int32, its successors
    totals: np.ndarray  # [C] float32, the weight of all successors, known or not; COUNTS only
    successors: (
        np.ndarray
    )  # [C, S] int32, the heaviest first, of equals the one that was so earlier
    weights: np.ndarray  # [C, S] float32
    touched: np.ndarray  # [C] uint8, since the hand last passed
    state: np.ndarray  # [2] int64: pairs in use, the pair that the hand points to

    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self)


class Scratch(NamedTuple):
    """The search tree's M nodes, node 0 standing for the text's end, and the draft of at most K."""

    before: np.ndarray  # [M] int32, the token before the node's own
    token: np.ndarray  # [M] int32
    parent: np.ndarray  # [M] int32
    depth: np.ndarray  # [M] int32
    first_child: np.ndarray  # [M] int32
    num_children: np.ndarray  # [M] int32, -1 where the successors were not looked up yet
    weight: np.ndarray  # [M] float64
    visits: np.ndarray  # [M] int32
    value: np.ndarray  # [M] float64, sum over visits; the path's probability in other searches
    place: np.ndarray  # [M] int32, where the node stands in the draft, -1 if nowhere
    frontier: np.ndarray  # [M] int32
    successors: np.ndarray  # [S] int32, of the pair looked up last
    weights: np.ndarray  # [S] float64
    draft_tokens: np.ndarray  # [K] int64
    draft_parents: np.ndarray  # [K] int64


def new_overlay(num_pairs: int) -> Overlay:
    """An empty one with room for so many pairs."""
    num_places = 1 << (2 * num_pairs - 1).bit_length()
    return Overlay(
        places=np.full(num_places, _EMPTY, dtype=np.int32),
        keys=np.zeros(num_pairs, dtype=np.int64),
        sizes=np.zeros(num_pairs, dtype=np.int32),
        totals=np.zeros(num_pairs, dtype=np.float32),
        successors=np.zeros((num_pairs, MAX_SUCCESSORS), dtype=np.int32),
        weights=np.zeros((num_pairs, MAX_SUCCESSORS), dtype=np.float32),
        touched=np.zeros(num_pairs, dtype=np.uint8),
        state=np.zeros(2, dtype=np.int64),
    )


def grown(overlay: Overlay, num_pairs: int) -> Overlay:
    """The same with room for more pairs."""
    larger = new_overlay(num_pairs)
    for name in ("keys", "sizes", "totals", "successors", "weights", "touched", "state"):
        old = getattr(overlay, name)
        getattr(larger, name)[: len(old)] = old
    _index_all(larger)
    return larger


def new_scratch(iterations: int, num_draft_tokens: int) -> Scratch:
    """Room for a search that expands a node in each iteration, or for each node of the draft."""
    # a search by visits looks once more behind each path it takes
    num_expanded = 1 + iterations + num_draft_tokens
    num_nodes = 1 + num_expanded * MAX_SUCCESSORS
    int_nodes = [np.zeros(num_nodes, dtype=np.int32) for _ in range(9)]
    float_nodes = [np.zeros(num_nodes, dtype=np.float64) for _ in range(2)]
    before, token, parent, depth, first_child, num_children, visits, place, frontier = int_nodes
    return Scratch(
        before,
        token,
        parent,
        depth,
        first_child,
        num_children,
        float_nodes[0],
        visits,
        float_nodes[1],
        place,
        frontier,
        np.zeros(MAX_SUCCESSORS, dtype=np.int32),
        np.zeros(MAX_SUCCESSORS, dtype=np.float64),
        np.zeros(num_draft_tokens, dtype=np.int64),
        np.zeros(num_draft_tokens, dtype=np.int64),
    )


# --- pairs and their successors -------------------------------------------------------------------


@compiled
def _key(t1: int, t2: int) -> np.int64:
    return (np.int64(t1) << np.int64(32)) | np.int64(t2)


@compiled
def _home(key: np.int64, mask: int) -> np.int64:
    """The place of the hash where a pair is looked for first."""
    return np.int64((np.uint64(key) * _GOLDEN) >> np.uint64(33)) & mask


@compiled
def _find(overlay: Overlay, key: np.int64) -> int:
    """The overlay's pair, -1 if it has none such."""
    mask = len(overlay.places) - 1
    place = _home(key, mask)
    while True:
        pair = overlay.places[place]
        if pair == _EMPTY or overlay.keys[pair] == key:
            return pair
        place = (place + 1) & mask


@compiled
def _find_in_table(table: Table, t1: int, t2: int) -> tuple[int, int]:
    """Where the pair's successors begin and end; bounds are kept even if the file is damaged."""
    if t1 < 0 or t1 + 1 >= len(table.starts):
        return 0, 0
    low = max(table.starts[t1], 0)
    end = min(table.starts[t1 + 1], len(table.seconds))
    high = end
    while low < high:
        middle = (low + high) // 2
        if table.seconds[middle] < t2:
            low = middle + 1
        else:
            high = middle
    if low >= end or table.seconds[low] != t2:
        return 0, 0
    first = max(table.offsets[low], 0)
    last = min(table.offsets[low + 1], first + MAX_SUCCESSORS, len(table.successors))
    return first, last


@compiled
def _look_up(
    table: Table, overlay: Overlay, is_counts: bool, t1: int, t2: int, scratch: Scratch
) -> int:
    """Copy a pair's successors and weights to scratch; returns how many there are."""
    pair = _find(overlay, _key(t1, t2))
    if pair >= 0:
        scale = 1.0 / overlay.totals[pair] if is_counts else 1.0
        size = overlay.sizes[pair]
        for j in range(size):
            scratch.successors[j] = overlay.successors[pair, j]
            scratch.weights[j] = overlay.weights[pair, j] * scale
        return size
    first, last = _find_in_table(table, t1, t2)
    for j in range(last - first):
        scratch.successors[j] = table.successors[first + j]
        scratch.weights[j] = table.weights[first + j]
    return max(last - first, 0)


# --- learning -------------------------------------------------------------------------------------


@compiled
def _insert(overlay: Overlay, pair: int) -> None:
    mask = len(overlay.places) - 1
    place = _home(overlay.keys[pair], mask)
    while overlay.places[place] != _EMPTY:
        place = (place + 1) & mask
    overlay.places[place] = pair


@compiled
def _index_all(overlay: Overlay) -> None:
    for pair in range(overlay.state[0]):
        _insert(overlay, pair)


@compiled
def _remove(overlay: Overlay, pair: int) -> None:
    """Take a pair out of the hash and close the gap, so that no search ends too early."""
    mask = len(overlay.places) - 1
    gap = _home(overlay.keys[pair], mask)
    while overlay.places[gap] != pair:
        gap = (gap + 1) & mask
    place = gap
    while True:
        place = (place + 1) & mask
        other = overlay.places[place]
        if other == _EMPTY:
            break
        if (place - _home(overlay.keys[other], mask)) & mask >= (place - gap) & mask:
            overlay.places[gap] = other
            gap = place
    overlay.places[gap] = _EMPTY


@compiled
def _add(table: Table, overlay: Overlay, rule: Rule, t1: int, t2: int) -> int:
    """A place for a new pair, with what the table knows of it.

    Where all are in use, the hand passes over those that were touched since it last came by.
    """
    pair = overlay.state[0]
    if pair < len(overlay.keys):
        overlay.state[0] += 1
    else:
        pair = overlay.state[1]
        while overlay.touched[pair]:
            overlay.touched[pair] = 0
            pair = (pair + 1) % len(overlay.keys)
        overlay.state[1] = (pair + 1) % len(overlay.keys)
        _remove(overlay, pair)
    overlay.keys[pair] = _key(t1, t2)
    _insert(overlay, pair)
    first, last = _find_in_table(table, t1, t2)
    scale = rule.prior if rule.kind == COUNTS else 1.0
    for j in range(last - first):
        overlay.successors[pair, j] = table.successors[first + j]
        overlay.weights[pair, j] = table.weights[first + j] * scale
    overlay.sizes[pair] = max(last - first, 0)
    overlay.totals[pair] = rule.prior
    return pair


@compiled
def learn(
    table: Table, overlay: Overlay, rule: Rule, tokens: np.ndarray, first: int, last: int
) -> None:
    """Learn the tri-grams that end at tokens[first:last], `first` being at least 2."""
    for i in range(first, last):
        t1, t2, t3 = tokens[i - 2], tokens[i - 1], tokens[i]
        pair = _find(overlay, _key(t1, t2))
        if pair < 0:
            pair = _add(table, overlay, rule, t1, t2)
        overlay.touched[pair] = 1
        successors, weights = overlay.successors[pair], overlay.weights[pair]
        size = overlay.sizes[pair]
        if rule.kind == COUNTS:
            for k in range(size):
                weights[k] *= rule.decay
            overlay.totals[pair] = overlay.totals[pair] * rule.decay + 1.0
        j = 0
        while j < size and successors[j] != t3:
            j += 1
        if j == size:
            # a new one; where there is no room it takes the place of the lightest
            j = min(size, MAX_SUCCESSORS - 1)
            overlay.sizes[pair] = j + 1
            successors[j] = t3
            weights[j] = 0.0
        if rule.kind == COUNTS:
            weights[j] += 1.0
        else:
            weights[j] = min(weights[j] + rule.step, rule.cap)
        while j > 0 and weights[j] > weights[j - 1]:
            weights[j], weights[j - 1] = weights[j - 1], weights[j]
            successors[j], successors[j - 1] = successors[j - 1], successors[j]
            j -= 1


# --- random numbers -------------------------------------------------------------------------------


@compiled
def _mix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def _uniform(seed: int, position: int, number: int) -> float:
    """The `number`-th uniform draw in [0, 1) at a position."""
    at = _mix(np.uint64(seed) + _GOLDEN * _STREAM) + _GOLDEN * np.uint64(position + 1)
    bits = _mix(_mix(at) + _GOLDEN * np.uint64(number + 1))
    return np.float64(bits >> np.uint64(11)) * 2.0**-53


# --- searching ------------------------------------------------------------------------------------


@compiled
def _expand(
    table: Table, overlay: Overlay, is_counts: bool, scratch: Scratch, num_nodes: int, node: int
) -> int:
    """Give a node its children, the heaviest first; returns how many nodes there are now."""
    size = _look_up(table, overlay, is_counts, scratch.before[node], scratch.token[node], scratch)
    scratch.first_child[node] = num_nodes
    scratch.num_children[node] = size
    for j in range(size):
        child = num_nodes + j
        scratch.before[child] = scratch.token[node]
        scratch.token[child] = scratch.successors[j]
        scratch.parent[child] = node
        scratch.depth[child] = scratch.depth[node] + 1
        scratch.num_children[child] = -1
        scratch.weight[child] = scratch.weights[j]
        scratch.visits[child] = 0
        scratch.value[child] = 0.0
        scratch.place[child] = -1
    return num_nodes + size


@compiled
def _plant(scratch: Scratch, t1: int, t2: int) -> None:
    """Make node 0 the end of the text."""
    scratch.before[0] = t1
    scratch.token[0] = t2
    scratch.parent[0] = -1
    scratch.depth[0] = 0
    scratch.num_children[0] = -1
    scratch.visits[0] = 0
    scratch.value[0] = 0.0
    scratch.place[0] = -1


@compiled
def _to_draft(scratch: Scratch, num_drafted: int, node: int) -> int:
    """Put a node into the draft, behind its parent; returns how many are in it now."""
    scratch.draft_tokens[num_drafted] = scratch.token[node]
    scratch.draft_parents[num_drafted] = scratch.place[scratch.parent[node]]
    scratch.place[node] = num_drafted
    return num_drafted + 1


@compiled
def _choose(scratch: Scratch, explore: np.ndarray, node: int) -> int:
    """The child with the largest PUCT score; one that was never visited comes before all others."""
    first = scratch.first_child[node]
    bonus = explore[scratch.visits[node]]
    best, best_score = first, -1.0
    for child in range(first, first + scratch.num_children[node]):
        visits = scratch.visits[child]
        if visits == 0:
            return child
        score = scratch.value[child] / visits + bonus * scratch.weight[child] / (1 + visits)
        if score > best_score:
            best, best_score = child, score
    return best


@compiled
def _search(
    table: Table,
    overlay: Overlay,
    is_counts: bool,
    scratch: Scratch,
    explore: np.ndarray,
    levels: int,
    iterations: int,
    seed: int,
    position: int,
) -> int:
    """Monte Carlo tree search of so many levels; returns how many nodes there are."""
    num_nodes, num_drawn = 1, 0
    for _ in range(iterations):
        node, value = 0, 1.0
        while scratch.depth[node] < levels:
            is_leaf = scratch.num_children[node] < 0
            if is_leaf:
                num_nodes = _expand(table, overlay, is_counts, scratch, num_nodes, node)
            if scratch.num_children[node] == 0:
                break
            node = _choose(scratch, explore, node)
            value += scratch.weight[node]
            if is_leaf:
                break
        # from there on, draws in proportion to the weights
        t1, t2 = scratch.before[node], scratch.token[node]
        for _ in range(scratch.depth[node], levels):
            size = _look_up(table, overlay, is_counts, t1, t2, scratch)
            if size == 0:
                break
            total = 0.0
            for j in range(size):
                total += scratch.weights[j]
            left = _uniform(seed, position, num_drawn) * total
            num_drawn += 1
            j = 0
            while j < size - 1 and left >= scratch.weights[j]:
                left -= scratch.weights[j]
                j += 1
            value += scratch.weights[j]
            t1, t2 = t2, scratch.successors[j]
        while node >= 0:
            scratch.visits[node] += 1
            scratch.value[node] += value
            node = scratch.parent[node]
    return num_nodes


@compiled
def _push_children(scratch: Scratch, num_open: int, node: int) -> int:
    for j in range(scratch.num_children[node]):
        scratch.frontier[num_open] = scratch.first_child[node] + j
        num_open += 1
    return num_open


@compiled
def _pop_best(scratch: Scratch, score: np.ndarray, num_open: int) -> int:
    """Take the open node of the largest score, of equals the oldest, out of the frontier."""
    at = 0
    for k in range(1, num_open):
        node, best = scratch.frontier[k], scratch.frontier[at]
        if score[node] > score[best] or (score[node] == score[best] and node < best):
            at = k
    node = scratch.frontier[at]
    scratch.frontier[at] = scratch.frontier[num_open - 1]
    return node


@compiled
def _most_visited(
    table: Table,
    overlay: Overlay,
    is_counts: bool,
    scratch: Scratch,
    num_nodes: int,
    depth: int,
    paths: int,
    most: int,
) -> int:
    """The draft of the paths to the most visited nodes, each gone on with by its likeliest token.

    A node has at least its children's visits, so the best open node is always the next best of all.
    """
    num_drafted = 0
    num_open = _push_children(scratch, 0, 0)
    for _ in range(paths):
        if num_open == 0 or num_drafted == most:
            break
        node = _pop_best(scratch, scratch.visits, num_open)
        num_open -= 1
        if scratch.place[node] < 0:
            num_drafted = _to_draft(scratch, num_drafted, node)
        if scratch.num_children[node] >= 0:
            num_open = _push_children(scratch, num_open, node)
        elif scratch.depth[node] < depth:
            num_nodes = _expand(table, overlay, is_counts, scratch, num_nodes, node)
        if scratch.num_children[node] > 0 and num_drafted < most:
            child = scratch.first_child[node]
            if scratch.place[child] < 0:
                num_drafted = _to_draft(scratch, num_drafted, child)
    return num_drafted


@compiled
def _best_first(
    table: Table,
    overlay: Overlay,
    is_counts: bool,
    scratch: Scratch,
    breadth_first: bool,
    depth: int,
    most: int,
) -> int:
    """The draft of the likeliest paths, or of all paths level by level."""
    num_drafted = num_open = 0
    num_nodes, node = 1, 0
    scratch.value[0] = 1.0
    while True:
        if scratch.depth[node] < depth:
            num_nodes = _expand(table, overlay, is_counts, scratch, num_nodes, node)
            num_open = _push_children(scratch, num_open, node)
            first = scratch.first_child[node]
            total = 0.0
            for child in range(first, num_nodes):
                total += scratch.weight[child]
            for child in range(first, num_nodes):
                share = scratch.weight[child] / max(total, 1.0)
                scratch.value[child] = -child if breadth_first else scratch.value[node] * share
        if num_open == 0 or num_drafted == most:
            return num_drafted
        node = _pop_best(scratch, scratch.value, num_open)
        num_open -= 1
        num_drafted = _to_draft(scratch, num_drafted, node)


@compiled
def grow_tree(
    table: Table,
    overlay: Overlay,
    is_counts: bool,
    scratch: Scratch,
    explore: np.ndarray,
    search: int,
    depth: int,
    iterations: int,
    paths: int,
    most: int,
    t1: int,
    t2: int,
    seed: int,
    position: int,
) -> int:
    """A draft behind tokens t1, t2, into scratch; returns how many tokens it has.

    explore: [iterations + 1], the PUCT score's factor by the parent's visits. depth: most levels of
    the draft. most: its most tokens. (seed, position) name the random numbers.
    """
    _plant(scratch, t1, t2)
    if search != MCTS:
        return _best_first(table, overlay, is_counts, scratch, search == FULL, depth, most)
    # the last level is what the paths are gone on with
    num_nodes = _search(
        table,
        overlay,
        is_counts,
        scratch,
        explore,
        max(1, depth - 1),
        iterations,
        seed,
        position,
    )
    return _most_visited(table, overlay, is_counts, scratch, num_nodes, depth, paths, most)


def exploration(c1: float, c2: float, iterations: int) -> np.ndarray:
    """[iterations + 1]: (c1 + ln((N + c2 + 1) / c2)) sqrt(N) for a parent visited N times."""
    num_visits = np.arange(iterations + 1, dtype=np.float64)
    factor: np.ndarray = (c1 + np.log((num_visits + c2 + 1.0) / c2)) * np.sqrt(num_visits)
    return factor
