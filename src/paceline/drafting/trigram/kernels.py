"""Learning tri-grams from a row's text and searching them for a draft, on flat arrays, compiled.

`paceline.testing.trigram_reference` does the same in plain Python and gives the same trees. The kernels
share a module because the cache of compiled code needs it (see `paceline.compiled`). After ADED (arXiv
2407.12021) and its released code; the differences are in docs/drafters/trigram_tree.md.

Words: a *pair* is two neighbouring tokens, its *successors* are the tokens that followed it; the *table*
is read only, the *overlay* holds the pairs learned from text, which replace the table's; *weights* are
probabilities, except under the released update rule, where they grow up to a cap.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from paceline.compiled import compiled, inlined
from paceline.drafting.trigram.table import MAX_SUCCESSORS, Table
from paceline.noise.kernels import GOLDEN, bits_at, mix

RELEASED: Final = 1  # update rules
COUNTS: Final = 2
MCTS: Final = 0  # searches
GREEDY: Final = 1
FULL: Final = 2

Arrays: TypeAlias = tuple[np.ndarray, ...]
Numbers: TypeAlias = tuple[Any, ...]

_EMPTY: Final = -1
_STREAM: Final = np.uint64(4)  # of random numbers; the other streams are in paceline.noise


class Rule(NamedTuple):
    """The update of the overlay by text; see the drafter's settings for the numbers."""

    kind: int
    step: float
    cap: float
    decay: float
    prior: float


class Search(NamedTuple):
    """The search for drafts; see the drafter's settings for the numbers."""

    kind: int
    depth: int
    iterations: int
    paths: int
    num_draft_tokens: int
    seed: int


class Overlay(NamedTuple):
    """C pairs with room for S = MAX_SUCCESSORS successors each, found by a hash table of H places."""

    # [H] int32, the pair at a place of the hash table; H is a power of two, at least 2 C
    places: np.ndarray
    keys: np.ndarray  # [C] int64, the pair's two tokens
    sizes: np.ndarray  # [C] int32, its successors
    totals: np.ndarray  # [C] float32, the weight of all successors, kept or not; COUNTS only
    # [C, S] int32, the heaviest first, of equals the one that reached the weight earlier
    successors: np.ndarray
    weights: np.ndarray  # [C, S] float32
    touched: np.ndarray  # [C] uint8, since the clock hand last passed
    state: np.ndarray  # [2] int64: pairs in use, position of the clock hand

    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self)


# A node of the search tree. One record array instead of an array per field, because numba counts the
# references of every array that it passes to a function.
_NODE: Final = np.dtype(
    [
        ("weight", np.float64),
        ("value", np.float64),  # sum over visits
        ("mean", np.float64),  # value / visits, infinite before the first one
        ("share", np.float64),  # weight / (1 + visits)
        ("rank", np.float64),  # order in which nodes enter the draft: visits or path probability
        ("before", np.int32),  # the token before the node's own
        ("token", np.int32),
        ("parent", np.int32),
        ("depth", np.int32),
        ("first_child", np.int32),
        ("num_children", np.int32),  # -1 before the successors are looked up
        ("visits", np.int32),
        ("place", np.int32),  # in the draft, -1 if it is not in it
    ],
    align=True,
)


class Scratch(NamedTuple):
    """The search tree's M nodes, of which node 0 is the text's end, and a draft of at most K tokens."""

    nodes: np.ndarray  # [M] of _NODE
    frontier: np.ndarray  # [M] int32
    successors: np.ndarray  # [S] int32, of the pair looked up last
    weights: np.ndarray  # [S] float64
    draft: np.ndarray  # [2, K] int64, tokens and parents; not contiguous


def new_overlay(num_pairs: int) -> Overlay:
    """Return an empty overlay with room for `num_pairs` pairs."""
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
    """Return a copy with room for more pairs."""
    larger = new_overlay(num_pairs)
    for name in ("keys", "sizes", "totals", "successors", "weights", "touched", "state"):
        old = getattr(overlay, name)
        getattr(larger, name)[: len(old)] = old
    _index_all(larger)
    return larger


@compiled
def _new_scratch(num_expanded: int, draft: np.ndarray) -> Scratch:
    """Return the memory of a search that expands `num_expanded` nodes."""
    num_nodes = 1 + num_expanded * MAX_SUCCESSORS
    return Scratch(
        np.empty(num_nodes, dtype=_NODE),
        np.empty(num_nodes, dtype=np.int32),
        np.empty(MAX_SUCCESSORS, dtype=np.int32),
        np.empty(MAX_SUCCESSORS, dtype=np.float64),
        draft,
    )


# --- pairs and their successors -------------------------------------------------------------------


@compiled
def _key(t1: int, t2: int) -> np.int64:
    return (np.int64(t1) << np.int64(32)) | np.int64(t2)


@compiled
def _home(key: np.int64, mask: int) -> np.int64:
    """Return the place of the hash table at which the search for a pair starts."""
    return np.int64((np.uint64(key) * GOLDEN) >> np.uint64(33)) & mask


@inlined
def _find(overlay: Overlay, key: np.int64) -> int:
    """Return the overlay's pair of a key, -1 if there is none."""
    mask = len(overlay.places) - 1
    place = _home(key, mask)
    while True:
        pair = overlay.places[place]
        if pair == _EMPTY or overlay.keys[pair] == key:
            return pair
        place = (place + 1) & mask


@inlined
def _find_in_table(table: Table, t1: int, t2: int) -> tuple[int, int]:
    """Return the first and last place of a pair's successors, within bounds even in a damaged file."""
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


@inlined
def _look_up(
    table: Table, overlay: Overlay, is_counts: bool, t1: int, t2: int, scratch: Scratch
) -> int:
    """Copy a pair's successors and weights to scratch; return their number."""
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
    """Remove a pair from the hash table and close the gap, so that no search ends too early."""
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
    """Add a pair with the table's successors; return its place.

    If all places are in use, the clock hand replaces the next pair not touched since it last passed.
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
            # a new successor; without room it replaces the lightest
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


# --- searching ------------------------------------------------------------------------------------


@compiled
def _uniform(bits: np.uint64, number: int) -> float:
    """Return the `number`-th uniform draw in [0, 1) that starts from `bits`."""
    return np.float64(mix(bits + GOLDEN * np.uint64(number + 1)) >> np.uint64(11)) * 2.0**-53


@inlined
def _expand(
    table: Table, overlay: Overlay, is_counts: bool, scratch: Scratch, num_nodes: int, node: int
) -> int:
    """Add a node's children, the heaviest first; return the new number of nodes."""
    nodes = scratch.nodes
    token, depth = nodes[node].token, nodes[node].depth + 1
    size = _look_up(table, overlay, is_counts, nodes[node].before, token, scratch)
    nodes[node].first_child = num_nodes
    nodes[node].num_children = size
    for j in range(size):
        child = num_nodes + j
        _set(nodes, child, node, depth, token, scratch.successors[j], scratch.weights[j])
    return num_nodes + size


@inlined
def _set(
    nodes: np.ndarray, node: int, parent: int, depth: int, before: int, token: int, weight: float
) -> None:
    nodes[node].before = before
    nodes[node].token = token
    nodes[node].parent = parent
    nodes[node].depth = depth
    nodes[node].num_children = -1
    nodes[node].weight = weight
    nodes[node].visits = 0
    nodes[node].value = 0.0
    nodes[node].mean = np.inf
    nodes[node].share = weight
    nodes[node].rank = 0.0
    nodes[node].place = -1


@compiled
def _choose(nodes: np.ndarray, explore: np.ndarray, node: int) -> int:
    """Return the child with the largest PUCT score, or the first that was never visited."""
    first = nodes[node].first_child
    bonus = explore[nodes[node].visits]
    best, best_score = first, -1.0
    for child in range(first, first + nodes[node].num_children):
        if nodes[child].visits == 0:
            return child
        score = nodes[child].mean + bonus * nodes[child].share
        if score > best_score:
            best, best_score = child, score
    return best


@compiled
def _draw(scratch: Scratch, size: int, uniform: float) -> int:
    """Return one of the successors looked up last, in proportion to their weights."""
    total = 0.0
    for j in range(size):
        total += scratch.weights[j]
    left = uniform * total
    for j in range(size - 1):
        if left < scratch.weights[j]:
            return j
        left -= scratch.weights[j]
    return size - 1


@compiled
def _search(
    table: Table,
    overlay: Overlay,
    is_counts: bool,
    scratch: Scratch,
    explore: np.ndarray,
    levels: int,
    iterations: int,
    bits: np.uint64,
) -> int:
    """Run a Monte Carlo tree search of `levels` levels; return the number of nodes."""
    nodes = scratch.nodes
    num_nodes, num_drawn = 1, 0
    for _ in range(iterations):
        node, value = 0, 1.0
        while nodes[node].depth < levels:
            is_leaf = nodes[node].num_children < 0
            if is_leaf:
                num_nodes = _expand(table, overlay, is_counts, scratch, num_nodes, node)
            if nodes[node].num_children == 0:
                break
            node = _choose(nodes, explore, node)
            value += nodes[node].weight
            if is_leaf:
                break
        if node == 0:
            break  # the pair has no successors
        # roll-out
        t1, t2 = nodes[node].before, nodes[node].token
        for _ in range(nodes[node].depth, levels):
            size = _look_up(table, overlay, is_counts, t1, t2, scratch)
            if size == 0:
                break
            j = _draw(scratch, size, _uniform(bits, num_drawn))
            num_drawn += 1
            value += scratch.weights[j]
            t1, t2 = t2, scratch.successors[j]
        # update the nodes up to the root
        while node >= 0:
            visits = nodes[node].visits + 1
            nodes[node].visits = visits
            nodes[node].rank = visits
            nodes[node].value += value
            nodes[node].mean = nodes[node].value / visits
            nodes[node].share = nodes[node].weight / (1 + visits)
            node = nodes[node].parent
    return num_nodes


@inlined
def _push_children(scratch: Scratch, num_open: int, node: int) -> int:
    for j in range(scratch.nodes[node].num_children):
        scratch.frontier[num_open] = scratch.nodes[node].first_child + j
        num_open += 1
    return num_open


@inlined
def _pop_best(nodes: np.ndarray, frontier: np.ndarray, num_open: int) -> int:
    """Remove the open node of the highest rank, of equals the oldest, from the frontier; return it."""
    at, best = 0, frontier[0]
    for k in range(1, num_open):
        node = frontier[k]
        if nodes[node].rank > nodes[best].rank or (
            nodes[node].rank == nodes[best].rank and node < best
        ):
            at, best = k, node
    frontier[at] = frontier[num_open - 1]
    return best


@inlined
def _to_draft(scratch: Scratch, num_drafted: int, node: int) -> int:
    """Append a node to the draft, which holds its parent; return the new number of drafted nodes."""
    nodes = scratch.nodes
    scratch.draft[0, num_drafted] = nodes[node].token
    scratch.draft[1, num_drafted] = nodes[nodes[node].parent].place
    nodes[node].place = num_drafted
    return num_drafted + 1


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
    """Write the draft of the paths to the most visited nodes, each extended by its likeliest token.

    A node has at least as many visits as each child, so the best open node is the next best of all.
    Returns the number of drafted nodes.
    """
    nodes = scratch.nodes
    num_drafted = 0
    num_open = _push_children(scratch, 0, 0)
    for _ in range(paths):
        if num_open == 0 or num_drafted == most:
            break
        node = _pop_best(nodes, scratch.frontier, num_open)
        num_open -= 1
        if nodes[node].place < 0:
            num_drafted = _to_draft(scratch, num_drafted, node)
        if nodes[node].num_children >= 0:
            num_open = _push_children(scratch, num_open, node)
        elif nodes[node].depth < depth:
            num_nodes = _expand(table, overlay, is_counts, scratch, num_nodes, node)
        likeliest = nodes[node].first_child
        if nodes[node].num_children > 0 and num_drafted < most and nodes[likeliest].place < 0:
            num_drafted = _to_draft(scratch, num_drafted, likeliest)
    return num_drafted


@inlined
def _best_first(
    table: Table,
    overlay: Overlay,
    is_counts: bool,
    scratch: Scratch,
    breadth_first: bool,
    depth: int,
    most: int,
) -> int:
    """Write the draft of the likeliest paths, or of all paths level by level; return its size."""
    nodes = scratch.nodes
    num_drafted = num_open = 0
    num_nodes, node = 1, 0
    nodes[0].rank = 1.0  # a path's probability
    while True:
        if nodes[node].depth < depth:
            first = num_nodes
            num_nodes = _expand(table, overlay, is_counts, scratch, num_nodes, node)
            num_open = _push_children(scratch, num_open, node)
            total = 0.0
            for child in range(first, num_nodes):
                total += nodes[child].weight
            for child in range(first, num_nodes):
                share = nodes[child].weight / max(total, 1.0)
                nodes[child].rank = -child if breadth_first else nodes[node].rank * share
        if num_open == 0 or num_drafted == most:
            return num_drafted
        node = _pop_best(nodes, scratch.frontier, num_open)
        num_open -= 1
        num_drafted = _to_draft(scratch, num_drafted, node)


@inlined
def _grow_tree(
    table: Table,
    overlay: Overlay,
    is_counts: bool,
    explore: np.ndarray,
    search: Search,
    depth: int,
    t1: int,
    t2: int,
    position: int,
    draft: np.ndarray,
) -> int:
    """Write tokens and parents of a draft after tokens t1, t2 to draft [2, K]; return its size.

    depth: maximum number of levels of the draft. The random numbers are a function of (seed, position).
    """
    kind, most = search.kind, search.num_draft_tokens
    # the root, one node per iteration, and one per node of the draft
    num_expanded = 1 + most + (search.iterations if kind == MCTS else 0)
    # allocated here, because numba's own arrays cost less than passing numpy's to it
    scratch = _new_scratch(num_expanded, draft)
    _set(scratch.nodes, 0, -1, 0, t1, t2, 0.0)
    if kind != MCTS:
        return _best_first(table, overlay, is_counts, scratch, kind == FULL, depth, most)
    # the paths are extended by the last level
    levels = max(1, depth - 1)
    bits = bits_at(np.uint64(search.seed), np.uint64(position), _STREAM)
    num_nodes = _search(
        table, overlay, is_counts, scratch, explore, levels, search.iterations, bits
    )
    return _most_visited(table, overlay, is_counts, scratch, num_nodes, depth, search.paths, most)


@compiled
def learn_and_draft(
    table_arrays: Arrays,
    overlay_arrays: Arrays,
    rule_numbers: Numbers,
    search_numbers: Numbers,
    explore: np.ndarray,
    tokens: np.ndarray,
    first: int,
    last: int,
    limit: int,
    position: int,
    drafts: np.ndarray,
    row: int,
) -> int:
    """Learn the text tokens[first:last], then write a draft after it to drafts[:, row]; return its size.

    The first four are the fields of `Table`, `Overlay`, `Rule` and `Search`: numba reads a plain tuple
    in half the time. explore: [iterations + 1], the PUCT score's factor by the parent's visits. limit:
    maximum number of levels. position: tokens before the draft. drafts: [2, R, K] int64, tokens and
    parents.
    """
    t, o, r, s = table_arrays, overlay_arrays, rule_numbers, search_numbers
    table = Table(t[0], t[1], t[2], t[3], t[4])
    overlay = Overlay(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7])
    rule = Rule(r[0], r[1], r[2], r[3], r[4])
    search = Search(s[0], s[1], s[2], s[3], s[4], s[5])
    learn(table, overlay, rule, tokens, first + 2, last)
    if limit < 1 or last - first < 2:
        return 0
    return _grow_tree(
        table,
        overlay,
        rule.kind == COUNTS,
        explore,
        search,
        min(limit, search.depth),
        tokens[last - 2],
        tokens[last - 1],
        position,
        drafts[:, row],
    )


def exploration(c1: float, c2: float, iterations: int) -> np.ndarray:
    """Return [iterations + 1]: (c1 + ln((N + c2 + 1) / c2)) sqrt(N) for a parent with N visits."""
    num_visits = np.arange(iterations + 1, dtype=np.float64)
    factor: np.ndarray = (c1 + np.log((num_visits + c2 + 1.0) / c2)) * np.sqrt(num_visits)
    return factor
