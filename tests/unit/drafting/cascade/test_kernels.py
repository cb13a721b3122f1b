"""The rule of a cascade against readable references: which part drafts, and what is learned from it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.cascade import kernels
from paceline.drafting.cascade.kernels import MAX_CHANCE, NUM_BINS, NUM_SURE
from paceline.drafting.draft_replay import accepted_path
from paceline.drafting.evidence import NUM_CLASSES

LOOKUP_WEIGHT, MODEL_WEIGHT = 12.0, 6.0  # observations of an average part


class Question(NamedTuple):
    """The arguments of `choose` for one row."""

    evidence: np.ndarray  # [L, K]
    parents: np.ndarray  # [L, K]
    lengths: np.ndarray  # [L]
    limit: int
    tables: np.ndarray  # [L, NUM_CLASSES]
    prospects: np.ndarray  # [M, NUM_BINS, 2]
    seen: np.ndarray  # [L + M, 2]
    verifying: np.ndarray  # [W + 1]
    drafting: np.ndarray  # [M, W + 1]
    rooms: np.ndarray  # [M]

    def answer(self) -> tuple[int, int, int, bool, np.ndarray]:
        width = max(self.evidence.shape[1], len(self.verifying))
        chances = np.zeros((len(self.seen), width))
        part, length, sure, branches = kernels.choose(*self, chances)[:4]
        return part, length, sure, branches, chances


def draw_question(seed: int, L: int, M: int, K: int, W: int) -> Question:
    """Draw drafts, chances and prices that rise in steps; often no part is far better than another."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, K + 1, L)
    chain = rng.random((L, K)) < 0.6
    earlier = rng.integers(-1, np.maximum(np.arange(K), 1), (L, K))
    parents = np.where(chain, np.arange(K) - 1, np.minimum(earlier, np.arange(K) - 1))
    steps = np.cumsum(rng.choice([0.0, 0.02, 0.5], W + 1, p=[0.5, 0.4, 0.1]))
    steps[1:] += rng.choice([0.0, 0.9])  # sometimes any draft is dear
    seen = rng.uniform(0, 9, (L + M, 2))
    return Question(
        rng.integers(0, NUM_CLASSES, (L, K)),
        parents,
        lengths,
        int(rng.integers(0, W + 3)),
        rng.uniform(0.01, 1.0, (L, NUM_CLASSES)),
        rng.uniform(0.1, 1.0, (M, NUM_BINS, 2)),
        seen,
        1.0 + steps,
        np.where(np.arange(W + 1) > 0, 0.05 * rng.random((M, 1)) * np.arange(W + 1) + 0.02, 0.0),
        rng.integers(0, W + 2, M),
    )


questions = st.builds(
    draw_question,
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 8),
    st.integers(1, 10),
)


def confidence_in(seen: np.ndarray, weight: float) -> float:
    expected, accepted = seen
    return float((accepted + weight) / (expected + weight))


def bin_by_definition(q: Question) -> int:
    """0 without a draft; otherwise the best first token's chance in seven equal steps."""
    first = [
        float(q.tables[lookup, q.evidence[lookup, node]])
        for lookup in range(len(q.lengths))
        for node in range(q.lengths[lookup])
        if q.parents[lookup, node] == -1
    ]
    return min(1 + int(7 * max(first)), 7) if first else 0


def chances_by_definition(q: Question) -> list[list[float]]:
    """P_i of every token that each part may draft."""
    of_parts = []
    longest = len(q.verifying) - 1
    for lookup, length in enumerate(q.lengths):
        trust = confidence_in(q.seen[lookup], LOOKUP_WEIGHT)
        chances: list[float] = []
        for node in range(min(length, longest)):
            own = min(MAX_CHANCE, q.tables[lookup, q.evidence[lookup, node]] * trust)
            parent = q.parents[lookup, node]
            chances.append(own * (chances[parent] if parent >= 0 else 1.0))
        of_parts.append(chances)
    for model, room in enumerate(q.rooms):
        trust = confidence_in(q.seen[len(q.lengths) + model], MODEL_WEIGHT)
        first, further = (
            min(MAX_CHANCE, chance * trust) for chance in q.prospects[model, bin_by_definition(q)]
        )
        n = max(0, min(q.limit, room, longest))
        of_parts.append([first * further**k for k in range(n)])
    return of_parts


def rates_by_definition(q: Question) -> dict[tuple[int, int], float]:
    """Expected tokens per second of every part at every length, the first of equal ones first."""
    rates = {(-1, 0): 1.0 / q.verifying[0]}
    for part, chances in enumerate(chances_by_definition(q)):
        model = part - len(q.lengths)
        for n in range(1, len(chances) + 1):
            seconds = q.verifying[n] + (q.drafting[model, n] if model >= 0 else 0.0)
            rates[part, n] = (1.0 + sum(chances[:n])) / seconds
    return rates


@settings(max_examples=400, deadline=None)
@given(questions)
def test_the_choice_has_the_most_expected_tokens_per_second(q: Question) -> None:
    part, length, sure, branches, chances = q.answer()

    rates = rates_by_definition(q)
    best = max(rates.values())
    assert (part, length) in rates
    assert rates[part, length] == pytest.approx(best, rel=1e-12)
    # of clearly equal ones the first, so that a model is not asked in vain
    firsts = [option for option, rate in rates.items() if rate > best * (1 - 1e-12)]
    assert (part, length) in firsts
    assert sure == bin_by_definition(q)
    for i, expected in enumerate(chances_by_definition(q)):
        assert chances[i, : len(expected)] == pytest.approx(expected, rel=1e-12)
    is_tree = 0 <= part < len(q.lengths) and any(
        q.parents[part, node] != node - 1 for node in range(length)
    )
    assert branches == is_tree


def test_each_kind_of_answer_occurs() -> None:
    """Nothing, a chain and a tree of a lookup, and a model, each at several lengths."""
    answers = [draw_question(seed, 2, 2, 6, 8).answer()[:4] for seed in range(400)]

    assert sum(part < 0 for part, *_ in answers) > 10
    for lookup in (0, 1):
        assert {b for part, _, _, b in answers if part == lookup} == {False, True}
    for model in (2, 3):
        assert len({length for part, length, *_ in answers if part == model}) > 3
    assert {sure for _, _, sure, _ in answers} >= {0, 4, 7}


def flat(M: int, W: int, model_seconds: float = 0.1, **changes: np.ndarray | int) -> Question:
    """Return a question without drafts of the only lookup, at constant prices."""
    q = Question(
        np.zeros((1, 4), dtype=np.int64),
        np.arange(-1, 3)[None],
        np.zeros(1, dtype=np.int64),
        W,
        np.full((1, NUM_CLASSES), 0.5),
        np.full((M, NUM_BINS, 2), 0.8),
        np.zeros((1 + M, 2)),
        np.ones(W + 1),
        np.tile(np.where(np.arange(W + 1) > 0, model_seconds, 0.0), (M, 1)),
        np.full(M, W),
    )
    return q._replace(**changes)


def test_of_equal_parts_the_lookup_drafts_and_of_equal_models_the_first() -> None:
    assert flat(2, 3).answer()[0] == 1
    free = flat(1, 3, model_seconds=0.0, prospects=np.full((1, NUM_BINS, 2), 0.5))
    assert free._replace(lengths=np.array([3])).answer()[:2] == (0, 3)


@pytest.mark.parametrize(
    ("limit", "room", "expected"), [(0, 6, 0), (2, 6, 2), (6, 1, 1), (6, 6, 6)]
)
def test_a_model_drafts_within_the_limit_and_its_room(limit: int, room: int, expected: int) -> None:
    q = flat(1, 6, limit=limit, rooms=np.array([room]))

    assert q.answer()[1] == expected


def test_a_lookup_drafts_up_to_a_step_of_the_price() -> None:
    """Verification costs 1 up to two tokens and 3 from then on."""
    q = flat(0, 4, lengths=np.array([4]), verifying=np.array([1.0, 1.0, 1.0, 3.0, 3.0]))

    assert q.answer()[:2] == (0, 2)


def test_what_a_part_has_shown_decides() -> None:
    """A model of which eight tokens were expected and none accepted is not asked again at this price."""
    q = flat(1, 4, model_seconds=0.9)
    wrong = q.seen.copy()
    wrong[1] = (8.0, 0.0)

    assert q.answer()[0] == 1
    assert q._replace(seen=wrong).answer()[0] == -1


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 9))
def test_learning_counts_the_tokens_whose_parents_were_written(seed: int, n: int, m: int) -> None:
    """Accepted are those on the path of the text, expected all that the text decides on."""
    rng = np.random.default_rng(seed)
    parents = np.array([rng.integers(-1, i) if rng.random() < 0.4 else i - 1 for i in range(n)])
    tokens, written = rng.integers(0, 2, n), rng.integers(0, 2, m)
    base = rng.uniform(0.1, 1.0, n)
    before = rng.uniform(0, 3, 2)

    seen = before.copy()
    kernels.learn(tokens, parents, base, n, written, seen)

    path = accepted_path(tokens.tolist(), parents.tolist(), written.tolist())
    tested = [*([-1] if m else []), *path[: m - 1 if m else 0]]  # followed by a written token
    expected = sum(base[node] for node in range(n) if parents[node] in tested)
    assert seen - before == pytest.approx((expected, len(path)))


def test_tokens_beyond_the_draft_are_padding() -> None:
    seen = np.zeros(2)
    tokens, parents = np.array([5, 5, 5]), np.array([-1, 0, -1])
    kernels.learn(tokens, parents, np.full(3, 0.5), 1, np.array([5, 5, 5]), seen)

    assert seen.tolist() == [0.5, 1.0]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 8))
def test_a_drafted_chain_is_cut_where_its_tokens_per_second_are_most(seed: int, n: int) -> None:
    """What the chain has cost is spent, whatever its length."""
    rng = np.random.default_rng(seed)
    sure, table = rng.random(n), np.sort(rng.uniform(0.05, 1.0, NUM_SURE))
    verifying = 1.0 + np.cumsum(rng.choice([0.0, 0.1, 0.6], 9))
    spent = float(rng.uniform(0, 1))
    found = np.zeros(9)

    length = kernels.cut_chain(sure, table, verifying, spent, found)

    chances = np.cumprod([min(MAX_CHANCE, table[int(NUM_SURE * p)]) for p in sure])
    rates = [(1 + chances[:k].sum()) / (verifying[k] + spent) for k in range(n + 1)]
    assert rates[length] == pytest.approx(max(rates), rel=1e-12)
    assert all(rate < rates[length] * (1 + 1e-12) for rate in rates[:length])
    assert found[:n] == pytest.approx(chances)


def test_a_sure_probability_is_in_the_last_class() -> None:
    assert [kernels.sure_class(p) for p in (0.0, 0.0625, 0.999, 1.0)] == [0, 1, 15, 15]


def test_the_least_hope_is_where_a_further_token_earns_its_seconds() -> None:
    """Of 2 tokens per second, 0.1 s for a further token are worth a chance of 0.2 that it counts."""
    verifying, drafting = 1.0 + 0.06 * np.arange(7), 0.04 * np.arange(7)

    assert kernels.least_hope(2.0, 0.8, verifying, drafting, 3) == pytest.approx(0.2 / 0.8)
    assert kernels.least_hope(2.0, 0.1, verifying, drafting, 3) == 1.0
    assert kernels.least_hope(2.0, 0.8, np.ones(7), np.zeros(7), 6) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6))
def test_bins_of_many_positions_are_those_of_each(seed: int, L: int, K: int) -> None:
    asked = [draw_question(seed + i, L, 0, K, 3) for i in range(4)]
    evidence, parents = (np.stack([q[i] for q in asked], axis=1) for i in (0, 1))
    lengths = np.stack([q.lengths for q in asked], axis=1)
    tables = asked[0].tables

    found = kernels.bins_of(evidence, parents, lengths, tables)

    assert found.tolist() == [bin_by_definition(q._replace(tables=tables)) for q in asked]


@pytest.mark.parametrize(
    ("chance", "expected"),
    [(0.001, 1), (0.142, 1), (0.143, 2), (0.5, 4), (0.857, 6), (0.99, 7), (1.0, 7)],
)  # fmt: skip
def test_bins_are_sevenths_of_the_best_chance(chance: float, expected: int) -> None:
    q = flat(0, 2, lengths=np.array([1]), tables=np.full((1, NUM_CLASSES), chance))

    assert kernels.bin_of(q.evidence, q.parents, q.lengths, q.tables) == expected
