"""Logged requests: one arm each, rewarded by the clock, and a bandit that learns from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.config import LearningSection
from paceline.contracts import CollectedPrompt
from paceline.errors import ConfigError, StoreError
from paceline.learning.clocked import ClockedRequest, clocked_dataset
from paceline.learning.dataset import build_dataset
from paceline.learning.learners import LEARNERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.costs import CostTable

ARMS = ("none", "code", "math")


def request(i: int, arm: str, seconds: float, kind: float = 0.0, **changes: int) -> ClockedRequest:
    features = np.random.default_rng(i).normal(size=8) * 0.1 + kind
    sizes = {"num_prompt": 10, "num_tokens": 41, "rows": 1} | changes
    return ClockedRequest(f"r{i}", arm, features, seconds=seconds, **sizes)


def test_a_reward_is_the_price_of_plain_decoding_over_the_clock(
    cost_table: Callable[..., CostTable],
) -> None:
    costs = cost_table(["code", "math"])
    data = clocked_dataset([request(0, "code", 31.0), request(1, "none", 62.0)], ARMS, costs)

    # the prefill takes 2 s and each of 40 plain rounds 1.5
    assert data.rewards[0, 1] == pytest.approx((2.0 + 40 * 1.5) / 31.0)
    assert data.rewards[1, 0] == pytest.approx(1.0)
    assert np.isnan(data.rewards).sum() == 4
    assert np.array_equal(np.isnan(data.rewards), np.isnan(data.seconds))


def test_what_no_arm_had_a_hand_in_is_left_out(cost_table: Callable[..., CostTable]) -> None:
    logged = [
        request(0, "code", 31.0),
        request(1, "none", 62.0),
        request(2, "none", 2.0, num_tokens=1),
        request(3, "another", 9.0),
    ]
    assert clocked_dataset(logged, ARMS, cost_table(["code", "math"])).ids == ("r0", "r1")


def test_one_arm_alone_teaches_nothing(cost_table: Callable[..., CostTable]) -> None:
    logged = [request(i, "code", 30.0) for i in range(20)]
    with pytest.raises(StoreError, match=r"20 logged requests, all served by code.*explore > 0"):
        clocked_dataset(logged, ARMS, cost_table(["code", "math"]))


def test_a_bandit_learns_which_arm_suits_which_request(
    cost_table: Callable[..., CostTable],
) -> None:
    rng = np.random.default_rng(0)
    logged = []
    for i in range(300):
        kind, arm = (1.0 if i % 2 else -1.0), ARMS[rng.integers(3)]
        fast = {"code": kind > 0, "math": kind < 0}.get(arm, False)
        logged.append(request(i, arm, (30.0 if fast else 62.0) * rng.uniform(0.9, 1.1), kind))
    data = clocked_dataset(logged, ARMS, cost_table(["code", "math"]))
    settings = LearningSection(reward="clocked", learner="linucb")

    fitted = LEARNERS["linucb"].fit(data, settings, lambda *call: None)

    preferred = fitted.chooser.preferences(data.features, data.situation()).argmax(axis=1)
    right = np.where(np.arange(300) % 2, 1, 2)
    assert (preferred == right).mean() > 0.95


def test_a_collection_has_no_clock(
    collected: Callable[..., CollectedPrompt], cost_table: Callable[..., CostTable]
) -> None:
    prompts = [collected(f"p{i}", {"code": 3}, np.arange(3) + i) for i in range(10)]
    with pytest.raises(ConfigError, match="'clocked' is of logged requests"):
        build_dataset(
            prompts, ("none", "code"), cost_table(["code"]), LearningSection(reward="clocked")
        )
