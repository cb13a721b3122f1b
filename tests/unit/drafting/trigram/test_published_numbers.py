"""The search and the update against numbers computed by hand from ADED (arXiv 2407.12021).

Both twins are tested, so a mistake that both make shows. The numbers here are written out, not imported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paceline.drafting.trigram import kernels
from paceline.drafting.trigram.search import Learned, TreeSearch
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.trigram.table import Table, empty_table
from paceline.testing import trigram_reference as reference

# after (0, 0) comes 1 with 0.6 and 2 with 0.5: under the released rule weights are no probabilities
WEIGHTS = {1: 0.6, 2: 0.5}


def test_the_released_settings_are_those_of_the_paper() -> None:
    expected = {
        "c1": 32.0, "c2": 8.0, "iterations": 150, "paths": 24, "num_draft_tokens": 64, "depth": 4,
        "update_step": 0.04, "update_cap": 3.0, "update_window": 16, "search": "mcts",
        "update": "released",
    }  # fmt: skip
    found = TrigramTreeSettings(preset="released")
    assert {name: getattr(found, name) for name in expected} == expected
    default = TrigramTreeSettings()
    assert (default.c1, default.c2, default.iterations, default.paths) == (32.0, 8.0, 150, 24)


@pytest.mark.parametrize(
    ("c1", "c2", "visits", "by_hand"),
    [
        # (c1 + ln((N + c2 + 1) / c2)) sqrt(N)
        (32.0, 8.0, 0, 0.0),
        (32.0, 8.0, 1, 32.223143551314),  # ln(10 / 8) = 0.223143551314
        (32.0, 8.0, 4, 64.971015632),  # 2 (32 + ln(13 / 8)) = 2 * 32.485507815782
        (32.0, 8.0, 150, 428.531649),  # 12.247448714 (32 + ln(159 / 8)) = 12.247448714 * 34.989463
        (0.0, 1.0, 2, 1.960516286937),  # 1.414213562373 ln 4
        (1.814, 8.0, 16, 11.813737),  # 4 (1.814 + ln(25 / 8)) = 4 * 2.953434283
    ],
)
def test_the_factor_of_exploration_is_the_papers(
    c1: float, c2: float, visits: int, by_hand: float
) -> None:
    node = reference.Node((0, 1), None, 1, weight=1.0, visits=1, value=0.0)
    compiled = kernels.exploration(c1, c2, 150)
    for found in (compiled[visits], 2 * reference.puct_score(node, visits, c1, c2)):
        assert found == pytest.approx(by_hand, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(
    ("iterations", "visits"),
    [
        # c1 = 0 and c2 = 1, so that the logarithm decides. Values: 1.6 and 1.5 a visit. Each child is
        # visited once, then N = 2: 1.6 + 1.9605 * 0.6 / 2 = 2.188 and 1.5 + 1.9605 * 0.5 / 2 = 1.990
        (3, (2, 1)),
        # N = 3: 1.6 + 2.7876 * 0.6 / 3 = 2.158 and 1.5 + 2.7876 * 0.5 / 2 = 2.197
        (4, (2, 2)),
        # N = 4: 1.6 + 3.5835 * 0.6 / 3 = 2.317 and 1.5 + 3.5835 * 0.5 / 3 = 2.097
        (5, (3, 2)),
        # N = 5: 1.6 + 4.3512 * 0.6 / 4 = 2.253 and 1.5 + 4.3512 * 0.5 / 3 = 2.225
        (6, (4, 2)),
        # N = 6: 1.6 + 5.0936 * 0.6 / 5 = 2.211 and 1.5 + 5.0936 * 0.5 / 3 = 2.349
        (7, (4, 3)),
    ],
)
def test_visits_are_those_computed_by_hand(iterations: int, visits: tuple[int, int]) -> None:
    value = visits[0] * 1.6 + visits[1] * 1.5
    for nodes in (searched(iterations, 0.0, 1.0), searched_by_reference(iterations, 0.0, 1.0)):
        root, *children = nodes
        assert [visited for visited, _ in children] == list(visits)
        assert root == (iterations, pytest.approx(value))
        assert children[0] == (visits[0], pytest.approx(visits[0] * 1.6))


def test_without_the_logarithm_the_better_child_would_be_visited_alone() -> None:
    """c1 = 0, and c2 so large that the logarithm is 0."""
    for nodes in (searched(7, 0.0, 1e18), searched_by_reference(7, 0.0, 1e18)):
        assert [visited for visited, _ in nodes[1:]] == [6, 1]


def searched(iterations: int, c1: float, c2: float) -> list[tuple[int, Any]]:
    """Return (visits, value) of the root and its children after a compiled search of one level."""
    table = Table(
        starts=np.array([0, 1], dtype=np.int64),
        offsets=np.array([0, 2], dtype=np.int64),
        seconds=np.array([0], dtype=np.int32),
        successors=np.array(list(WEIGHTS), dtype=np.int32),
        weights=np.array(list(WEIGHTS.values()), dtype=np.float32),
    )
    for array in table:
        array.setflags(write=False)
    scratch = kernels._new_scratch(iterations + 2, np.zeros((2, 8), dtype=np.int64)[:, :4])
    root = (scratch.nodes, 0, -1, 0, 0, 0, 0.0)
    kernels._set(*root)
    explore = kernels.exploration(c1, c2, iterations)
    overlay = kernels.new_overlay(2)
    count = kernels._search(table, overlay, False, scratch, explore, 1, iterations, np.uint64(0))
    assert count == 3
    return [(int(node["visits"]), float(node["value"])) for node in scratch.nodes[:count]]


def searched_by_reference(iterations: int, c1: float, c2: float) -> list[tuple[int, Any]]:
    rule = kernels.Rule(kernels.RELEASED, 0.04, 3.0, 1.0, 1.0)
    statistics = reference.ReferenceStatistics({(0, 0): list(WEIGHTS.items())}, rule, 2)
    tree = reference.Tree(statistics, [reference.Node((0, 0), None, 0)])
    reference.run_search(tree, (c1, c2), 1, iterations, 0, 0)
    return [(node.visits, node.value) for node in tree.nodes]


def test_the_released_update_adds_the_papers_step_up_to_its_cap() -> None:
    settings = TrigramTreeSettings(preset="released")
    search, learned = TreeSearch(empty_table(), settings), Learned(8)
    rule = kernels.Rule(kernels.RELEASED, settings.update_step, settings.update_cap, 1.0, 1.0)
    twin = reference.ReferenceStatistics({}, rule, 8)
    by_hand = {1: 0.04, 2: 0.08, 10: 0.4, 74: 2.96, 76: 3.0, 90: 3.0}
    for times in range(1, 91):
        search.learn(learned, [5, 6, 7])
        twin.learn([5, 6, 7], 2, 3)
        if times in by_hand:
            weight = pytest.approx(by_hand[times], rel=1e-5)
            assert learned.overlay.weights[0, 0] == weight
            assert twin.successors(5, 6) == [(7, weight)]


def test_a_learned_pair_keeps_sixteen_successors() -> None:
    settings = TrigramTreeSettings(preset="released")
    search, learned = TreeSearch(empty_table(), settings), Learned(8)
    rule = kernels.Rule(kernels.RELEASED, 0.04, 3.0, 1.0, 1.0)
    twin = reference.ReferenceStatistics({}, rule, 8)
    for token in range(10, 40):
        search.learn(learned, [5, 6, token])
        twin.learn([5, 6, token], 2, 3)
    assert learned.overlay.sizes[0] == 16 == len(twin.successors(5, 6))
