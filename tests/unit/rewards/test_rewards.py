"""Rewards: seconds of requests, similarities, the alignment reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.costs import CostTable, Measurement
from paceline.rewards import (
    METRICS,
    alignment_reward,
    alignments,
    cost_score,
    request_seconds,
    rouge_1_f1,
    rouge_l_f1,
    token_seconds,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def prices(subject: str, operation: str, tokens: Any, context: Any = 0, rows: int = 1) -> Any:
    """Return made-up seconds that depend on every argument but the rows."""
    base = {
        "prefill": 100.0, "forward": 10.0, "round": 1.0, "start": 50.0, "propose": 5.0
    }[operation]  # fmt: skip
    weight = 1 + len(subject) / 100
    return weight * (base + 0.25 * tokens + 0.001 * context)


def seconds_one_by_one(arm: str, num_prompt: int, rounds: Sequence[tuple[int, int]]) -> float:
    """Walk the rounds and count the cached tokens: the readable reference."""
    total = prices("target", "prefill", num_prompt)
    if not rounds:
        return float(total)
    if arm != "none":
        total += prices(arm, "start", num_prompt)
    emitted = 1
    for drafted, accepted in rounds:
        cached = num_prompt + emitted - 1
        total += prices("target", "forward", 1 + drafted, cached)
        total += prices("engine", "round", 0, 0)
        if arm != "none":
            total += prices(arm, "propose", drafted, cached)
        emitted += accepted + 1
    return float(total)


ROUNDS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).map(lambda r: (max(r), min(r))))


def as_array(rounds: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    return np.array(rounds, dtype=np.int64).reshape(-1, 2)


@given(st.sampled_from(["none", "math"]), st.integers(1, 900), ROUNDS)
def test_seconds_are_those_of_walking_the_rounds(
    arm: str, num_prompt: int, rounds: list[tuple[int, int]]
) -> None:
    got = request_seconds(prices, arm, num_prompt, as_array(rounds))
    assert got == pytest.approx(seconds_one_by_one(arm, num_prompt, rounds), rel=1e-12)


def test_an_answer_of_one_token_starts_no_drafter() -> None:
    of_none, of_math = (request_seconds(prices, arm, 7, as_array([])) for arm in ("none", "math"))
    assert of_math == of_none > 0.0


def test_an_arm_is_faster_by_the_forwards_it_saves() -> None:
    costs = {("target", "forward"): 1.0, ("math", "propose"): 0.25}

    def seconds(subject: str, operation: str, tokens: Any, context: Any, rows: int) -> float:
        return costs.get((subject, operation), 0.0)  # one figure for all rounds

    assert request_seconds(seconds, "none", 5, as_array([(0, 0)] * 10)) == 10
    assert request_seconds(seconds, "math", 5, as_array([(4, 4)] * 2)) == 2.5


def test_a_cost_table_prices_a_request() -> None:
    work = [("target", "prefill"), ("target", "forward"), ("engine", "round")]
    work += [("math", "start"), ("math", "propose")]
    table = CostTable({}, [Measurement(s, o, 1, 0, 1, 0.5) for s, o in work])
    assert request_seconds(table.seconds, "math", 9, as_array([(4, 2), (3, 3)])) == 0.5 * 8
    assert request_seconds(table.seconds, "none", 9, as_array([(0, 0)] * 3)) == 0.5 * 7


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


TOKENS = st.lists(st.integers(0, 5) | st.integers(0, 200_000), max_size=90)


@given(TOKENS, TOKENS)
def test_rouge_l_is_that_of_the_textbook_table(a: list[int], b: list[int]) -> None:
    if not a or not b:
        assert rouge_l_f1(a, b) == (1.0 if not a and not b else 0.0)
        return
    common = common_subsequence(a, b)
    precision, recall = common / len(b), common / len(a)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l_f1(a, b) == pytest.approx(f1)
    assert rouge_l_f1(tuple(a), tuple(b)) == rouge_l_f1(b, a)


def test_the_cost_score_is_the_saved_share() -> None:
    assert cost_score(0.25, 1.0) == 0.75
    assert cost_score(2.0, 1.0) == 0.0
    assert cost_score(0.0, 1.0) == 1.0


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_alignment_reward_lies_between_its_parts(alpha: float, s: float, c: float) -> None:
    reward = alignment_reward(alpha, s, c)
    assert min(s, c) - 1e-12 <= reward <= max(s, c) + 1e-12


def test_none_has_full_similarity_and_no_saving() -> None:
    rewards = alignments(prices, 0.3, 20, [1, 2, 3, 4], {"math": [1, 2, 9, 4], "code": []})
    assert rewards["none"] == 0.3
    t_target = token_seconds(prices, "none", 22)
    assert t_target == prices("target", "forward", 1, 22)
    score = cost_score(token_seconds(prices, "math", 22), t_target)
    assert rewards["math"] == pytest.approx(0.3 * 0.75 + 0.7 * score)
    assert rewards["code"] == pytest.approx(
        0.7 * cost_score(prices("code", "propose", 1, 22), t_target)
    )


def edit_distance(a: list[int], b: list[int]) -> int:
    """Return Levenshtein's distance, by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.integers(0, 4), max_size=12))
def test_similarities_are_those_counted_by_hand(a: list[int], b: list[int]) -> None:
    longer = max(len(a), len(b))
    common = sum(min(a.count(token), b.count(token)) for token in set(a))
    prefix = next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b)))
    if longer:
        assert rouge_1_f1(a, b) == pytest.approx(2 * common / (len(a) + len(b)))
        assert METRICS["edit"](a, b) == pytest.approx(1 - edit_distance(a, b) / longer)
        assert METRICS["prefix"](a, b) == pytest.approx(prefix / longer)
    for similarity in METRICS.values():
        assert similarity(a, a) == 1.0
        assert similarity(a, b) == similarity(b, a)
        assert 0.0 <= similarity(a, b) <= 1.0


def test_the_metric_is_the_requested_one() -> None:
    output, own = [1, 2, 3, 4], [4, 3, 2, 1]
    for name, similarity in METRICS.items():
        found = alignments(prices, 1.0, 10, output, {"code": own}, name)
        assert found["code"] == pytest.approx(similarity(output, own))
    assert len({round(s(output, own), 6) for s in METRICS.values()}) >= 3
