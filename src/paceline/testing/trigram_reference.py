"""The readable twin of `drafting/trigram/kernels.py`, in plain Python: dictionaries, lists, objects.

Gives the same trees. Tests and benchmarks compare the two. The numbers and formulas of ADED (arXiv
2407.12021 and its released code) are written down here once more, so that a mistake in one twin shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, sqrt
from typing import TYPE_CHECKING

import numpy as np

from paceline.drafting.trigram.kernels import COUNTS, FULL, MCTS, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Pair = tuple[int, int]
    Successors = list[tuple[int, float]]  # the heaviest first

_WORD = 2**64 - 1
_ROOM = 16  # successors of a learned pair; the paper prunes a table to 12


def float32(x: float) -> float:
    return float(np.float32(x))


# --- learning -------------------------------------------------------------------------------------


@dataclass
class Learned:
    """A pair of the overlay."""

    pair: Pair
    successors: Successors
    total: float
    touched: bool = False


@dataclass
class ReferenceStatistics:
    """A table, and the pairs learned from text, which replace the table's."""

    table: Mapping[Pair, Successors]
    rule: Rule
    max_pairs: int
    learned: list[Learned] = field(default_factory=list)  # by place, in the order of the clock hand
    by_pair: dict[Pair, Learned] = field(default_factory=dict)
    hand: int = 0

    def successors(self, t1: int, t2: int) -> Successors:
        known = self.by_pair.get((t1, t2))
        if known is None:
            return self.table.get((t1, t2), [])
        scale = 1.0 / known.total if self.rule.kind == COUNTS else 1.0
        return [(token, weight * scale) for token, weight in known.successors]

    def learn(self, tokens: Sequence[int], first: int, last: int) -> None:
        """Learn the tri-grams that end at tokens[first:last]."""
        for i in range(first, last):
            pair = (tokens[i - 2], tokens[i - 1])
            known = self.by_pair.get(pair) or self._add(pair)
            known.touched = True
            if self.rule.kind == COUNTS:
                decay = self.rule.decay
                known.successors = [(t, float32(w * decay)) for t, w in known.successors]
                known.total = float32(known.total * decay + 1.0)
            self._raise_weight(known.successors, tokens[i])

    def _add(self, pair: Pair) -> Learned:
        scale = self.rule.prior if self.rule.kind == COUNTS else 1.0
        copied = [(token, float32(weight * scale)) for token, weight in self.table.get(pair, [])]
        new = self.by_pair[pair] = Learned(pair, copied, float32(self.rule.prior))
        if len(self.learned) < self.max_pairs:
            self.learned.append(new)
            return new
        while self.learned[self.hand].touched:
            self.learned[self.hand].touched = False
            self.hand = (self.hand + 1) % self.max_pairs
        del self.by_pair[self.learned[self.hand].pair]
        self.learned[self.hand] = new
        self.hand = (self.hand + 1) % self.max_pairs
        return new

    def _raise_weight(self, successors: Successors, token: int) -> None:
        at = next((j for j, (t, _) in enumerate(successors) if t == token), len(successors))
        if at == len(successors):
            if len(successors) == _ROOM:
                successors.pop()
                at -= 1
            successors.append((token, 0.0))
        weight = successors.pop(at)[1]
        if self.rule.kind == COUNTS:
            weight = float32(weight + 1.0)
        else:
            weight = float32(min(weight + self.rule.step, self.rule.cap))
        while at > 0 and weight > successors[at - 1][1]:
            at -= 1
        successors.insert(at, (token, weight))


# --- random numbers -------------------------------------------------------------------------------


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)


def uniform(seed: int, position: int, number: int) -> float:
    golden, stream = 0x9E3779B97F4A7C15, 4
    at = mix(seed + golden * stream & _WORD) + golden * (position + 1) & _WORD
    return (mix(mix(at) + golden * (number + 1) & _WORD) >> 11) * 2.0**-53


# --- searching ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    pair: Pair  # the token before it and its own
    parent: Node | None
    depth: int
    weight: float = 0.0
    children: list[Node] | None = None  # None: not looked up yet
    visits: int = 0
    value: float = 0.0


@dataclass
class Tree:
    """A search tree over the statistics; `nodes` are in order of creation."""

    statistics: ReferenceStatistics
    nodes: list[Node]

    def expand(self, node: Node) -> list[Node]:
        node.children = [
            Node((node.pair[1], token), node, node.depth + 1, weight)
            for token, weight in self.statistics.successors(*node.pair)
        ]
        self.nodes += node.children
        return node.children


def reference_tree(
    statistics: ReferenceStatistics,
    puct: tuple[float, float],
    search: int,
    depth: int,
    iterations: int,
    paths: int,
    most: int,
    pair: Pair,
    seed: int,
    position: int,
) -> tuple[list[int], list[int]]:
    """Return (tokens, parents) of the draft after a pair.

    puct: the constants c1 and c2. position: number of tokens before the draft. The others are those of
    `kernels.Search`.
    """
    root = Node(pair, None, 0)
    tree = Tree(statistics, [root])
    if search == MCTS:
        run_search(tree, puct, max(1, depth - 1), iterations, seed, position)
        drafted = most_visited(tree, depth, paths, most)
    else:
        drafted = best_first(tree, search == FULL, depth, most)
    place = {node: k for k, node in enumerate(drafted)}
    tokens = [node.pair[1] for node in drafted]
    return tokens, [place[node.parent] if node.depth > 1 else -1 for node in drafted]  # type: ignore[index]


def run_search(
    tree: Tree,
    puct: tuple[float, float],
    levels: int,
    iterations: int,
    seed: int,
    position: int,
) -> None:
    num_drawn = 0
    for _ in range(iterations):
        node = tree.nodes[0]
        value = 1.0
        # selection and expansion
        while node.depth < levels:
            is_leaf = node.children is None
            children = tree.expand(node) if node.children is None else node.children
            if not children:
                break
            node = choose(node, children, *puct)
            value += node.weight
            if is_leaf:
                break
        # roll-out
        pair = node.pair
        for _ in range(node.depth, levels):
            successors = tree.statistics.successors(*pair)
            if not successors:
                break
            left = uniform(seed, position, num_drawn) * sum_in_order(successors)
            num_drawn += 1
            token, weight = draw(successors, left)
            value += weight
            pair = (pair[1], token)
        # update the nodes up to the root
        above: Node | None = node
        while above is not None:
            above.visits += 1
            above.value += value
            above = above.parent


def draw(successors: Successors, left: float) -> tuple[int, float]:
    """Return the successor at position `left` of the cumulated weights."""
    for token, weight in successors[:-1]:
        if left < weight:
            return token, weight
        left -= weight
    return successors[-1]


def sum_in_order(successors: Successors) -> float:
    total = 0.0  # `sum` of floats compensates its rounding errors, the compiled twin does not
    for _, weight in successors:
        total += weight
    return total


def choose(parent: Node, children: Sequence[Node], c1: float, c2: float) -> Node:
    """Return the child with the largest PUCT score, the first of equals."""
    return max(children, key=lambda node: puct_score(node, parent.visits, c1, c2))


def puct_score(node: Node, parent_visits: int, c1: float, c2: float) -> float:
    """Return V / n + (c1 + ln((N + c2 + 1) / c2)) p sqrt(N) / (1 + n); infinity before any visit.

    Symbols: value V, visits n, prior probability p of the node, N visits of its parent.
    """
    if node.visits == 0:
        return float("inf")
    exploration = (c1 + log((parent_visits + c2 + 1) / c2)) * sqrt(parent_visits)
    return node.value / node.visits + exploration * (node.weight / (1 + node.visits))


def most_visited(tree: Tree, depth: int, paths: int, most: int) -> list[Node]:
    ranked = sorted(tree.nodes[1:], key=lambda node: -node.visits)  # stable
    drafted: list[Node] = []
    for node in ranked[:paths]:
        likeliest = node.children
        if likeliest is None and node.depth < depth:
            likeliest = tree.expand(node)
        for new in [node, *(likeliest or [])[:1]]:
            if new not in drafted and len(drafted) < most:
                drafted.append(new)
        if len(drafted) == most:
            break
    return drafted


def best_first(tree: Tree, breadth_first: bool, depth: int, most: int) -> list[Node]:
    node = tree.nodes[0]
    node.value = 1.0  # the path's probability
    waiting: list[Node] = []
    drafted: list[Node] = []
    while True:
        if node.depth < depth:
            children = tree.expand(node)
            total = sum_in_order([(0, child.weight) for child in children])
            for child in children:
                child.value = node.value * (child.weight / max(total, 1.0))
            waiting += children
        if not waiting or len(drafted) == most:
            return drafted
        age = {n: i for i, n in enumerate(tree.nodes)}
        waiting.sort(key=lambda n: (0.0 if breadth_first else -n.value, age[n]))
        node = waiting.pop(0)
        drafted.append(node)
