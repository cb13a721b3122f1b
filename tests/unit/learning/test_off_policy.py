"""Off-policy estimates against a simulator in which every policy's true value is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.errors import StoreError
from paceline.learning.off_policy import (
    LoggedChoices,
    cross_fitted_rewards,
    difference,
    doubly_robust,
    doubly_robust_rewards,
    predicted_rewards,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.learning.off_policy import Estimate

A, F = 3, 4
REPLICATIONS = 1000
# what each arm earns depends on the request, and the arms differ in where they are good
THETA = np.array([[1.0, -0.5, 0.0], [0.0, 0.8, -0.6], [0.3, 0.0, 0.9], [0.0, 0.0, 0.0]])
BASE = np.array([1.0, 2.0, 1.5])


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def logging_policy(features: np.ndarray) -> np.ndarray:
    """Return shares that prefer an arm without regard to its reward, and sometimes try the others."""
    return 0.3 / A + 0.7 * softmax(features[:, :A] * [2.0, 0.0, -1.0])


def new_policy(features: np.ndarray) -> np.ndarray:
    greedy = (features @ THETA + BASE).argmax(axis=1)
    return np.eye(A)[greedy]


@dataclass
class Simulated:
    features: np.ndarray
    logged: LoggedChoices
    means: np.ndarray  # [n, A] what each arm would have earned on average


def simulate(seed: int, n: int = 200) -> Simulated:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, F))
    means = features @ THETA + BASE
    shares = logging_policy(features)
    chosen = (rng.random((n, 1)) > shares.cumsum(axis=1)).sum(axis=1)
    noise = rng.exponential(0.5, size=n) - 0.5  # skewed, as times are
    rewards = means[np.arange(n), chosen] + noise
    logged = LoggedChoices(chosen, shares[np.arange(n), chosen], rewards, A)
    return Simulated(features, logged, means)


def true_value(policy: Callable[[np.ndarray], np.ndarray]) -> float:
    features = np.random.default_rng(99).normal(size=(2_000_000, F))
    return float((policy(features) * (features @ THETA + BASE)).sum(axis=1).mean())


TRUTH = true_value(new_policy)


@cache
def replicate(estimate: Callable[[Simulated], Estimate]) -> list[Estimate]:
    return [estimate(simulate(seed)) for seed in range(REPLICATIONS)]


def by_no_model(s: Simulated) -> Estimate:
    """Estimate by inverse propensity scoring: a prediction of 0 for every arm."""
    return doubly_robust(s.logged, new_policy(s.features), np.zeros_like(s.means))


def by_good_model(s: Simulated) -> Estimate:
    return doubly_robust(s.logged, new_policy(s.features), s.means)


def by_wrong_model(s: Simulated) -> Estimate:
    return doubly_robust(s.logged, new_policy(s.features), np.tile([5.0, -1.0, 0.0], (200, 1)))


def by_own_model(s: Simulated) -> Estimate:
    model = cross_fitted_rewards(s.logged, s.features, ridge=0.1)
    return doubly_robust(s.logged, new_policy(s.features), model)


@pytest.mark.parametrize("estimate", [by_no_model, by_good_model, by_wrong_model, by_own_model])
def test_unbiased_and_honest_about_its_error(estimate: Callable[[Simulated], Estimate]) -> None:
    found = replicate(estimate)
    values = np.array([e.value for e in found])
    z = (values.mean() - TRUTH) / (values.std() / np.sqrt(REPLICATIONS))
    assert abs(z) < 4

    covered = np.mean([low <= TRUTH <= high for low, high in (e.interval() for e in found)])
    assert 0.92 < covered < 0.975
    stated = np.mean([e.standard_error for e in found])
    assert stated == pytest.approx(values.std(), rel=0.1)


def test_a_better_model_makes_a_smaller_error() -> None:
    spread = {
        estimate.__name__: np.std([e.value for e in replicate(estimate)])
        for estimate in (by_no_model, by_good_model, by_own_model, by_wrong_model)
    }
    assert spread["by_good_model"] < spread["by_own_model"] < 0.75 * spread["by_no_model"]
    assert spread["by_wrong_model"] > spread["by_no_model"]


def test_the_difference_of_two_policies_is_sharper_than_two_estimates() -> None:
    def almost(features: np.ndarray) -> np.ndarray:
        return np.where(features[:, [3]] > 1.5, logging_policy(features), new_policy(features))

    truth = true_value(almost) - TRUTH
    found = [
        difference(s.logged, new_policy(s.features), almost(s.features), s.means)
        for s in (simulate(seed) for seed in range(REPLICATIONS))
    ]
    values = np.array([e.value for e in found])
    assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(REPLICATIONS)
    assert values.std() < 0.5 * np.std([e.value for e in replicate(by_good_model)])


def test_effective_sample_size_is_n_when_both_policies_agree() -> None:
    s = simulate(0)
    shares = logging_policy(s.features)
    estimate = doubly_robust(s.logged, shares, np.zeros_like(s.means))

    assert weights(s.logged, shares) == pytest.approx(np.ones(200))
    assert estimate.effective_sample_size == pytest.approx(200)
    assert estimate.value == pytest.approx(s.logged.rewards.mean())
    assert by_no_model(s).effective_sample_size < 120


def test_without_exploration_only_the_same_choices_can_be_judged() -> None:
    s = simulate(0)
    certain = replace(s.logged, propensities=np.ones(200))
    same = np.eye(A)[certain.chosen]

    estimate = doubly_robust(certain, same, np.zeros_like(s.means))
    assert estimate.value == pytest.approx(certain.rewards.mean())
    blind = int((new_policy(s.features).argmax(axis=1) != certain.chosen).sum())
    with pytest.raises(StoreError, match=rf"{blind} of 200 logged .* explore > 0"):
        doubly_robust(certain, new_policy(s.features), s.means)


def test_filled_in_rewards_are_worth_what_the_estimate_says() -> None:
    s = simulate(0)
    filled = doubly_robust_rewards(s.logged, s.means)
    for policy in (new_policy(s.features), logging_policy(s.features)):
        expected = doubly_robust(s.logged, policy, s.means).value
        assert (filled * policy).sum(axis=1).mean() == pytest.approx(expected)
    with pytest.raises(StoreError, match="explore > 0"):
        doubly_robust_rewards(replace(s.logged, propensities=np.ones(200)), s.means)


def test_a_request_is_never_predicted_from_its_own_reward() -> None:
    s = simulate(0)
    before = cross_fitted_rewards(s.logged, s.features)
    for i in (0, 17, 199):
        rewards = s.logged.rewards.copy()
        rewards[i] += 1000.0
        after = cross_fitted_rewards(replace(s.logged, rewards=rewards), s.features)
        assert np.array_equal(after[i], before[i])
        assert not np.array_equal(after, before)


@pytest.mark.parametrize("n", [3000, 30])
def test_the_model_finds_what_is_linear_from_either_side(n: int) -> None:
    s = simulate(1, n)
    exact = replace(s.logged, rewards=s.logged.of_chosen(s.means))
    wide = np.hstack([s.features, np.zeros((n, 60))])  # more features than requests that say so
    for features in (s.features, wide):
        predicted = predicted_rewards(exact, features, features, ridge=1e-9)
        assert predicted == pytest.approx(s.means, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"propensities": np.array([0.0, 1.0])}, "propensity"),
        ({"propensities": np.array([0.5, 1.5])}, "propensity"),
        ({"propensities": np.array([0.5])}, "propensities"),
        ({"rewards": np.array([0.0, np.nan])}, "finite"),
        ({"chosen": np.array([0, 2])}, "none of the 2 arms"),
        ({"chosen": np.array([0])}, "at least two"),
    ],
)
def test_a_log_that_cannot_be_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    good = {
        "chosen": np.array([0, 1]),
        "propensities": np.array([0.5, 0.5]),
        "rewards": np.ones(2),
    }
    with pytest.raises(StoreError, match=message):
        LoggedChoices(**good | change, num_arms=2)


def test_probabilities_that_cannot_be_are_refused() -> None:
    s = simulate(0)
    for wrong in (np.ones((200, A)), np.ones((3, A)) / A, np.tile([1.5, -0.5, 0.0], (200, 1))):
        with pytest.raises(StoreError, match="probabilities"):
            doubly_robust(s.logged, wrong, s.means)
    with pytest.raises(StoreError, match="predicted rewards"):
        doubly_robust(s.logged, new_policy(s.features), s.means * np.nan)
