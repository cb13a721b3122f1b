"""Safe roll-out: a policy that is no better is adopted as rarely as stated, a better one is adopted."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.errors import StoreError
from paceline.learning.off_policy import LoggedChoices
from paceline.learning.rollout import MIN_PROMPTS, Logged, Replayed, adopt

TRIALS = 500
ALPHA = 0.05
# at most this share of trials if the true one is alpha, three standard deviations away
AT_MOST = ALPHA + 3 * (ALPHA * (1 - ALPHA) / TRIALS) ** 0.5


def replayed(seed: int, n: int, gain: float, disagree: float = 0.4) -> Replayed:
    """Draw prompts of very different lengths; on some the policies differ, by up to a third of the time.

    gain: the true share saved on those.
    """
    rng = np.random.default_rng([seed, n])
    current = rng.lognormal(0.0, 1.0, n)
    ratio = np.where(rng.random(n) < disagree, rng.choice([-0.3, 0.3], n) + gain, 0.0)
    return Replayed(current, current * (1 - ratio))


def skewed(seed: int, n: int) -> Replayed:
    """Draw policies equally fast on average; most prompts save a little, the losses are exponential."""
    saved = 0.2 * (1 - np.random.default_rng([seed, n]).exponential(size=n))
    return Replayed(np.ones(n), 1 - saved)


@pytest.mark.parametrize("n", [MIN_PROMPTS, 2 * MIN_PROMPTS])
def test_replayed_equals_are_adopted_no_more_often_than_said(n: int) -> None:
    symmetric = np.mean([adopt(replayed(seed, n, gain=0.0)).adopt for seed in range(TRIALS)])
    with_losses = np.mean([adopt(skewed(seed, n)).adopt for seed in range(TRIALS)])

    assert 0.01 < symmetric <= AT_MOST
    assert 0.01 < with_losses <= AT_MOST


def test_a_replayed_gain_is_found_and_a_loss_is_not() -> None:
    better = [adopt(replayed(seed, 300, gain=0.15)) for seed in range(100)]
    worse = [adopt(replayed(seed, 300, gain=-0.15)) for seed in range(100)]

    assert np.mean([v.adopt for v in better]) > 0.9
    assert not any(v.adopt for v in worse)
    assert np.mean([v.gain for v in better]) == pytest.approx(0.4 * 0.15, rel=0.1)
    assert all(v.low < v.gain for v in better)
    assert "better: gain +" in next(v for v in better if v.adopt).reason
    assert "not shown to be better" in worse[0].reason


def test_the_same_policy_again_is_not_adopted_and_a_sure_gain_is() -> None:
    seconds = np.random.default_rng(0).lognormal(size=100)

    assert not adopt(Replayed(seconds, seconds)).adopt
    assert adopt(Replayed(np.full(100, 2.0), np.full(100, 1.0))).adopt
    assert adopt(Replayed(seconds, seconds * 0.9)).adopt


def test_more_confidence_asks_for_more() -> None:
    evidence = replayed(1, 300, gain=0.1)
    lows = [adopt(evidence, confidence).low for confidence in (0.8, 0.95, 0.999)]

    assert lows == sorted(lows, reverse=True) and len(set(lows)) == 3


def logged(seed: int, gain: float, n: int = 400) -> Logged:
    """Draw explored choices of two arms; the candidate decides by the sign of the first feature."""
    rng = np.random.default_rng([seed, n])
    features = rng.normal(size=(n, 6))
    # the second arm is better by `gain` wherever the candidate would use it
    means = np.stack([features[:, 1], features[:, 1] + gain], axis=1)
    shares = np.tile([0.8, 0.2], (n, 1))
    chosen = (rng.random(n) < 0.2).astype(int)
    rewards = means[np.arange(n), chosen] + rng.normal(size=n)
    current = np.tile([1.0, 0.0], (n, 1))
    candidate = np.where(features[:, [0]] > 0, [[0.0, 1.0]], current)
    choices = LoggedChoices(chosen, shares[np.arange(n), chosen], rewards, 2)
    return Logged(choices, features, current, candidate)


def test_logged_equals_are_adopted_no_more_often_than_said() -> None:
    adopted = np.mean([adopt(logged(seed, gain=0.0)).adopt for seed in range(TRIALS)])

    assert 0.01 < adopted <= AT_MOST


def test_a_logged_gain_is_found_and_a_loss_is_not() -> None:
    better = [adopt(logged(seed, gain=0.8)) for seed in range(60)]

    assert np.mean([v.adopt for v in better]) > 0.9
    assert np.mean([v.gain for v in better]) == pytest.approx(0.5 * 0.8, rel=0.1)
    assert not any(adopt(logged(seed, gain=-0.8)).adopt for seed in range(60))


def test_too_little_evidence_keeps_the_current_policy() -> None:
    few = np.ones(MIN_PROMPTS - 1)
    verdict = adopt(Replayed(few, few / 2))
    assert not verdict.adopt and "99 prompts, at least 100" in verdict.reason
    verdict = adopt(logged(0, gain=5.0, n=60))
    assert not verdict.adopt and "effective sample" in verdict.reason


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_seconds_that_cannot_be_are_refused(bad: float) -> None:
    seconds = np.ones(100)
    wrong = seconds.copy()
    wrong[3] = bad
    with pytest.raises(StoreError, match="positive numbers"):
        Replayed(seconds, wrong)
