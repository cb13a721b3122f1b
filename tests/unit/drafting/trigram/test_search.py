"""The compiled search and learning equal those of the readable twin, to the last bit."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.trigram import kernels
from paceline.drafting.trigram.search import Learned, TreeSearch
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.trigram.table import MAX_SUCCESSORS, Table, empty_table
from paceline.testing.trigram_reference import ReferenceStatistics, reference_tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Pair = tuple[int, int]

QUICK = settings(max_examples=150, deadline=None, derandomize=True)
TEXTS = st.lists(st.integers(0, 4), max_size=60)


def statistics_of(text: Sequence[int], kept: int = 12) -> dict[Pair, list[tuple[int, float]]]:
    """Return the table of a text as a dictionary, with the stored probabilities."""
    counts: dict[Pair, Counter[int]] = {}
    for i in range(2, len(text)):
        counts.setdefault((text[i - 2], text[i - 1]), Counter())[text[i]] += 1
    return {
        pair: [
            (token, float(np.float32(n / of_pair.total())))
            for token, n in sorted(of_pair.items(), key=lambda item: (-item[1], item[0]))[:kept]
        ]
        for pair, of_pair in counts.items()
    }


def as_table(statistics: Mapping[Pair, Sequence[tuple[int, float]]]) -> Table:
    if not statistics:
        return empty_table()
    pairs = sorted(statistics)
    firsts = np.bincount([t1 for t1, _ in pairs])
    entries = [entry for pair in pairs for entry in statistics[pair]]
    table = Table(
        starts=np.r_[0, np.cumsum(firsts)].astype(np.int64),
        offsets=np.r_[0, np.cumsum([len(statistics[pair]) for pair in pairs])].astype(np.int64),
        seconds=np.array([t2 for _, t2 in pairs], dtype=np.int32),
        successors=np.array([token for token, _ in entries], dtype=np.int32),
        weights=np.array([weight for _, weight in entries], dtype=np.float32),
    )
    for array in table:
        array.setflags(write=False)
    return table


class Twins:
    """The compiled search and its twin, with equal statistics, text and settings."""

    def __init__(self, corpus: Sequence[int], **given: Any) -> None:
        self.settings = s = TrigramTreeSettings(**given)
        known = statistics_of(corpus)
        self.search = TreeSearch(as_table(known), s)
        self.learned = Learned(s.max_pairs)
        kind = kernels.RELEASED if s.update == "released" else kernels.COUNTS
        rule = kernels.Rule(kind, s.update_step, s.update_cap, s.decay, s.prior)
        self.reference = ReferenceStatistics(known, rule, s.max_pairs)

    def learn(self, text: Sequence[int]) -> None:
        self.search.learn(self.learned, text)
        self.reference.learn(text, 2, len(text))

    def trees(self, text: Sequence[int], limit: int) -> tuple[Any, Any]:
        s = self.settings
        reference = reference_tree(
            self.reference,
            (s.c1, s.c2),
            {"mcts": kernels.MCTS, "greedy": kernels.GREEDY, "full": kernels.FULL}[s.search],
            min(limit, s.depth),
            s.iterations,
            s.paths,
            s.num_draft_tokens,
            (text[-2], text[-1]),
            s.seed,
            len(text),
        )
        return self.search.draft(self.learned, text, limit), reference

    def weights(self) -> tuple[Any, Any]:
        """Return every learned pair with its successors, by place."""
        overlay = self.learned.overlay
        ours = []
        for pair in range(overlay.state[0]):
            size = overlay.sizes[pair]
            key = int(overlay.keys[pair])
            found = zip(
                overlay.successors[pair, :size].tolist(),
                overlay.weights[pair, :size].tolist(),
                strict=True,
            )
            ours.append(((key >> 32, key & 0xFFFFFFFF), list(found), float(overlay.totals[pair])))
        return ours, [(k.pair, k.successors, k.total) for k in self.reference.learned]


@QUICK
@given(
    TEXTS,
    TEXTS.filter(lambda text: len(text) > 1),
    st.sampled_from(["mcts", "greedy", "full"]),
    st.sampled_from(["counts", "released"]),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 60),
    st.integers(1, 30),
    st.floats(0.0, 40.0),
    st.integers(0, 2**62),
)
def test_trees_are_those_of_the_twin(
    corpus: list[int],
    text: list[int],
    search: str,
    update: str,
    most: int,
    depth: int,
    iterations: int,
    paths: int,
    c1: float,
    seed: int,
) -> None:
    twins = Twins(
        corpus,
        search=search,
        update=update,
        num_draft_tokens=most,
        depth=depth,
        iterations=iterations,
        paths=paths,
        c1=c1,
        seed=seed,
    )
    twins.learn(text)
    for limit in (1, 2, depth):
        ours, reference = twins.trees(text, limit)
        assert ours == reference
        tokens, parents = ours
        assert len(tokens) <= most
        assert all(-1 <= parent < k for k, parent in enumerate(parents))


@pytest.mark.parametrize("search", ["mcts", "greedy", "full"])
def test_trees_of_the_released_size_are_those_of_the_twin(search: str) -> None:
    order = random.Random(7)
    # pairs with one successor, and pairs with more successors than are kept
    words = [[order.randrange(40) for _ in range(order.randint(1, 4))] for _ in range(25)]
    corpus = [token for _ in range(400) for token in order.choice(words)]
    twins = Twins(corpus, preset="released", search=search)
    text = [token for _ in range(40) for token in order.choice(words)]
    sizes = set()
    for end in range(2, len(text), 9):
        twins.learn(text[max(0, end - 18) : end])
        ours, reference = twins.trees(text[:end], 4)
        assert ours == reference
        sizes.add(len(ours[0]))
    assert max(sizes) > 24 if search == "mcts" else max(sizes) == 64


@QUICK
@given(
    st.lists(st.integers(0, 40), max_size=200),
    TEXTS,
    st.sampled_from(["counts", "released"]),
    st.integers(1, 12),
    st.floats(0.05, 1.0),
)
def test_learning_equals_that_of_the_twin(
    text: list[int], corpus: list[int], update: str, max_pairs: int, decay: float
) -> None:
    """There is room for a few pairs, so that most are evicted."""
    twins = Twins(corpus, update=update, max_pairs=max_pairs, decay=decay)
    for piece in (text[:50], text[48:], text[:100]):
        twins.learn(piece)

        ours, reference = twins.weights()
        assert ours == reference
        assert len(ours) <= max_pairs
        # the hash table finds exactly the learned pairs
        for (t1, t2), _, _ in ours:
            assert kernels._find(twins.learned.overlay, kernels._key(t1, t2)) >= 0
        assert (twins.learned.overlay.places >= 0).sum() == len(ours)


def test_growing_forgets_nothing() -> None:
    order = random.Random(1)
    text = [order.randrange(200) for _ in range(3000)]
    twins = Twins([], update="counts")
    for start in range(0, len(text), 100):
        twins.learn(text[start : start + 102])

    ours, reference = twins.weights()
    assert ours == reference
    assert 1500 < len(ours) <= len(twins.learned.overlay.keys)


def test_a_pair_keeps_the_heaviest_of_too_many_successors() -> None:
    twins = Twins([], update="released")
    for token in [*range(10, 10 + MAX_SUCCESSORS), 10, 11, 99]:
        twins.learn([1, 2, token])

    [(pair, successors, _)], reference = twins.weights()
    assert [(pair, successors, 1.0)] == reference
    kept = [token for token, _ in successors]
    assert pair == (1, 2)
    assert kept[:2] == [10, 11]
    assert kept[-1] == 99
    assert len(kept) == MAX_SUCCESSORS


def test_a_damaged_table_is_not_read_out_of_bounds() -> None:
    table = as_table(statistics_of([1, 2, 3, 1, 2, 4, 1, 2, 3] * 3))
    wild = Table(
        starts=np.full_like(table.starts, 10**9),
        offsets=table.offsets,
        seconds=table.seconds,
        successors=table.successors,
        weights=table.weights,
    )
    far = table._replace(offsets=table.offsets + 10**9)
    for broken in (wild, far):
        for array in broken:
            array.setflags(write=False)
        search = TreeSearch(broken, TrigramTreeSettings())
        assert search.draft(Learned(8), [1, 2], 4) == ([], [])


# --- the searches ---------------------------------------------------------------------------------

CHAINS = [*[1, 2, 3, 4, 5, 6] * 6, *[1, 2, 7, 8, 9, 10] * 3, 1, 2, 11]


def drafted_paths(search: str, most: int, **given: Any) -> set[tuple[int, ...]]:
    twins = Twins(CHAINS, search=search, num_draft_tokens=most, update="none", **given)
    (tokens, parents), reference = twins.trees([1, 2], 10)
    assert (tokens, parents) == reference
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


def test_greedy_takes_the_likeliest_paths() -> None:
    assert drafted_paths("greedy", 4) == {(3,), (3, 4), (3, 4, 5), (3, 4, 5, 6)}
    assert drafted_paths("greedy", 6, depth=3) == {
        *[(3,), (3, 4), (3, 4, 5)],
        *[(7,), (7, 8), (7, 8, 9)],
    }


def test_full_takes_level_by_level() -> None:
    assert drafted_paths("full", 5) == {(3,), (7,), (11,), (3, 4), (7, 8)}


def test_search_prefers_likely_tokens_and_extends_them() -> None:
    found = drafted_paths("mcts", 8)
    assert {(3,), (3, 4), (3, 4, 5), (3, 4, 5, 6), (7,), (7, 8)} <= found


def test_random_draws_are_keyed_by_seed_and_position() -> None:
    order = random.Random(3)
    corpus = [order.randrange(9) for _ in range(5000)]

    def tree(seed: int, length: int) -> Any:
        # no exploration bonus, so that the random draws decide
        twins = Twins(corpus, search="mcts", seed=seed, iterations=40, c1=0.0, depth=6)
        return twins.trees([*[0] * length, 1, 2], 6)[0]

    assert tree(5, 3) == tree(5, 3)
    assert len({str(tree(seed, 3)) for seed in range(6)}) > 1
    assert len({str(tree(5, length)) for length in range(6)}) > 1
