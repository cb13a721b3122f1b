"""Off-policy evaluation against a simulator in which every arm's speed is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paceline.errors import StoreError
from paceline.learning.evaluation.logged import FEW, Served, evaluate_logged
from paceline.selection.choosers import FixedChooser, NetworkChooser, PolicyNetwork

ARMS = ("none", "code", "math")


def simulate(seed: int, num: int, explore: float = 0.5) -> tuple[Served, np.ndarray]:
    """(a log of a policy that takes `code` and explores, [n, A] logarithms of the true speeds)."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num, 3)).astype(np.float32)
    sign = np.sign(features[:, 0])
    speeds = np.stack([np.zeros(num), 0.3 + 0.2 * sign, 0.3 - 0.2 * sign], axis=1)
    distribution = np.full((num, 3), explore / 3)
    distribution[:, 1] += 1 - explore
    chosen = np.array([rng.choice(3, p=p) for p in distribution])
    every = np.arange(num)
    served = Served(
        arms=ARMS,
        chosen=chosen,
        propensities=distribution[every, chosen],
        tokens_per_second=100 * np.exp(speeds[every, chosen] + 0.1 * rng.normal(size=num)),
        features=features,
        num_prompt=rng.integers(5, 50, num),
        rows=rng.choice([1, 4], num),
    )
    return served, speeds


def by_sign() -> NetworkChooser:
    """Takes `code` where the first feature is positive, else `math`; the load is its last input."""
    w1 = np.array([[1.0], [0.0], [0.0], [0.0]], dtype=np.float32)
    w2 = np.array([[0.0, 1.0, -1.0]], dtype=np.float32)
    zeros, ones = np.zeros(4, dtype=np.float32), np.ones(4, dtype=np.float32)
    network = PolicyNetwork(zeros, ones, w1, zeros[:1], w2, np.array([-9.0, 0, 0], np.float32))
    return NetworkChooser(ARMS, [network])


def test_estimates_hold_the_truth_about_as_often_as_they_say() -> None:
    covered = dict.fromkeys(("ips", "snips", "doubly robust"), 0)
    widths = dict.fromkeys(covered, 0.0)
    for seed in range(60):
        served, speeds = simulate(seed, 400)
        distribution = served.distributions(by_sign())
        # the gain over what was served, which itself is a draw
        truth = np.exp(
            (distribution * speeds).sum(axis=1).mean()
            - np.log(served.tokens_per_second / 100).mean()
        )
        for name, gain in evaluate_logged(served, {"p": distribution}, seed).gains["p"].items():
            covered[name] += gain.speed.low <= truth <= gain.speed.high
            widths[name] += gain.speed.high - gain.speed.low
    assert all(count >= 50 for count in covered.values()), covered
    assert widths["doubly robust"] < widths["ips"]


def test_the_better_policy_is_found_better() -> None:
    served, _ = simulate(1, 1000)
    policies = {
        "by sign": served.distributions(by_sign()),
        "plain": served.distributions(FixedChooser(ARMS, "none")),
    }

    report = evaluate_logged(served, policies)

    assert report.gains["by sign"]["doubly robust"].speed.low > 1.1
    assert report.gains["plain"]["doubly robust"].speed.high < 0.9
    said = report.sentences()
    assert said[0].startswith("by sign is 1.") and "log says no more" not in said[0]


def test_a_log_that_seldom_did_the_same_is_named() -> None:
    served, _ = simulate(1, 400, explore=0.06)
    report = evaluate_logged(served, {"plain": served.distributions(FixedChooser(ARMS, "none"))})
    assert report.gains["plain"]["ips"].effective < FEW
    assert "log more with explore > 0" in report.sentences()[0]


def test_without_exploration_nothing_is_estimated() -> None:
    served, _ = simulate(1, 100)
    certain = replace(served, chosen=np.ones(100, dtype=int), propensities=np.ones(100))
    with pytest.raises(StoreError, match="explore > 0"):
        evaluate_logged(certain, {"p": served.distributions(by_sign())})


def test_what_cannot_be_served_is_refused() -> None:
    served, _ = simulate(1, 10)
    with pytest.raises(StoreError, match="no tokens per second"):
        replace(served, tokens_per_second=np.zeros(10))
    with pytest.raises(
        StoreError, match="the log has the arms none, code, math, the policy is for"
    ):
        served.distributions(FixedChooser(("none", "maths"), "none"))


def test_a_policy_is_told_the_load_of_each_request() -> None:
    served, _ = simulate(2, 50)
    chooser = FixedChooser(ARMS, "code")
    seen: list[tuple[int, int]] = []
    original = chooser.preferences

    def spy(features: np.ndarray, situation: object) -> np.ndarray:
        seen.append((situation.rows, len(features)))  # type: ignore[attr-defined]
        return original(features, situation)  # type: ignore[arg-type]

    chooser.preferences = spy  # type: ignore[method-assign]
    served.distributions(chooser)
    assert seen == [(1, int((served.rows == 1).sum())), (4, int((served.rows == 4).sum()))]
