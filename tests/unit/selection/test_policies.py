"""Policies: propensities, reproducibility, and the network against a readable reference."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from paceline.selection.network import CLIP, PolicyNetwork, softmax

from paceline.contracts import Context, SamplingParams
from paceline.errors import ArtefactError, ConfigError
from paceline.selection.features import feature_vector, num_features
from paceline.selection.policies import FixedPolicy, NetworkPolicy, RandomPolicy

D, H = 4, 3
ARMS = ("none", "code", "math")


def context(seed: int, rows_in_flight: int = 1) -> Context:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, 30).tolist()
    mean, last = rng.normal(size=(2, D)).astype(np.float32)
    return Context(tokens, mean, last, SamplingParams(), rows_in_flight)


def network(seed: int = 0, num_arms: int = len(ARMS)) -> PolicyNetwork:
    rng = np.random.default_rng(seed)
    F = num_features(D)
    shapes = [(F,), (F,), (F, H), (H,), (H, num_arms), (num_arms,)]
    return PolicyNetwork(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def logits_one_by_one(net: PolicyNetwork, features: np.ndarray) -> list[float]:
    """The readable reference: sums over features and hidden units."""
    inputs = [
        max(-CLIP, min(CLIP, (float(x) - float(m)) * float(s)))
        for x, m, s in zip(features, net.mean, net.scale, strict=True)
    ]
    hidden = [
        math.tanh(sum(x * float(w) for x, w in zip(inputs, net.w1[:, h], strict=True)) + net.b1[h])
        for h in range(len(net.b1))
    ]
    return [
        sum(x * float(w) for x, w in zip(hidden, net.w2[:, a], strict=True)) + net.b2[a]
        for a in range(len(net.b2))
    ]


def test_a_fixed_policy_says_its_arm() -> None:
    decision = FixedPolicy("math").choose(context(0))

    assert (decision.arm, decision.propensity) == ("math", 1.0)
    assert decision.policy == "fixed:math"


def test_a_random_policy_is_even_and_says_so() -> None:
    policy = RandomPolicy(ARMS, seed=3)
    decisions = [policy.choose(context(i)) for i in range(1500)]

    counts = Counter(decision.arm for decision in decisions)
    assert all(abs(counts[arm] - 500) < 75 for arm in ARMS)  # four standard deviations
    assert {decision.propensity for decision in decisions} == {1 / 3}
    assert all(sum(d.scores.values()) == pytest.approx(1.0) for d in decisions)


def test_a_random_choice_belongs_to_the_prompt_not_to_the_order() -> None:
    contexts = [context(i) for i in range(50)]
    forward = [RandomPolicy(ARMS, seed=1).choose(c).arm for c in contexts]
    policy = RandomPolicy(ARMS, seed=1)
    backward = [policy.choose(c).arm for c in reversed(contexts)]
    other_seed = [RandomPolicy(ARMS, seed=2).choose(c).arm for c in contexts]

    assert forward == backward[::-1]
    assert forward != other_seed


def test_logits_are_those_of_the_sums() -> None:
    net = network()
    features = [feature_vector(context(i)) for i in range(5)]
    features[0][3] = 1e6  # beyond the clip

    for vector in features:
        assert net.logits(vector) == pytest.approx(logits_one_by_one(net, vector), abs=1e-4)
    together = net.logits(np.stack(features))
    assert together == pytest.approx(np.stack([net.logits(v) for v in features]), abs=1e-5)


def test_a_learned_policy_takes_the_largest_logit() -> None:
    net = network()
    policy = NetworkPolicy(net, ARMS, "learned:x")
    chosen = set()
    for i in range(40):
        decision = policy.choose(context(i))
        logits = net.logits(feature_vector(context(i)))
        assert decision.arm == ARMS[int(logits.argmax())]
        assert decision.scores == pytest.approx(dict(zip(ARMS, softmax(logits), strict=True)))
        assert sum(decision.scores.values()) == pytest.approx(1.0)
        assert (decision.propensity, decision.policy) == (1.0, "learned:x")
        chosen.add(decision.arm)
    assert len(chosen) > 1


def test_a_feature_that_never_varied_in_training_says_nothing() -> None:
    net = network()
    net.scale[-1] = 0.0  # rows in flight
    policy = NetworkPolicy(net, ARMS, "x")

    assert policy.choose(context(0)).scores == policy.choose(context(0, rows_in_flight=64)).scores


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_hidden_state_does_not_stop_a_request(value: float) -> None:
    net = network()
    net.scale[:2] = 0.0
    broken = context(0)
    broken.mean_hidden[:] = value

    scores = NetworkPolicy(net, ARMS, "x").choose(broken).scores

    assert sum(scores.values()) == pytest.approx(1.0)


def test_softmax_survives_large_logits() -> None:
    assert softmax(np.array([1e4, 0.0, -1e4])).tolist() == [1.0, 0.0, 0.0]


def test_another_hidden_size_is_refused() -> None:
    wide = np.zeros(D + 1, dtype=np.float32)
    with pytest.raises(ArtefactError, match=r"learned on 14 features.*gives 16.*paceline learn"):
        NetworkPolicy(network(), ARMS, "x").choose(Context([1], wide, wide, SamplingParams(), 1))


def test_arms_and_outputs_must_agree() -> None:
    with pytest.raises(ArtefactError, match="2 outputs for 3 arms"):
        NetworkPolicy(network(num_arms=2), ARMS, "x")
    with pytest.raises(ConfigError, match="distinct arms"):
        RandomPolicy(["none", "none"])
