"""Policies: propensities, reproducibility, and the fields of a decision."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.contracts import Context, SamplingParams
from paceline.errors import ArtefactError, ConfigError
from paceline.selection import Policy
from paceline.selection.choosers import (
    Chooser,
    FixedChooser,
    NetworkChooser,
    PolicyNetwork,
    RandomChooser,
    softmax,
)
from paceline.selection.choosers.network import with_rows
from paceline.selection.features import feature_vector, num_features

if TYPE_CHECKING:
    from paceline.selection.choosers import Situation

D, H = 4, 3
ARMS = ("none", "code", "math")


def context(seed: int, rows_in_flight: int = 1) -> Context:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, 30).tolist()
    mean, last = rng.normal(size=(2, D)).astype(np.float32)
    return Context(tokens, mean, last, SamplingParams(), rows_in_flight, request_id=str(seed))


def network(seed: int = 0) -> PolicyNetwork:
    rng = np.random.default_rng(seed)
    F, A = num_features(D) + 1, len(ARMS)
    shapes = [(F,), (F,), (F, H), (H,), (H, A), (A,)]
    return PolicyNetwork(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def learned(**settings: object) -> Policy:
    chooser = NetworkChooser(ARMS, [network()])
    return Policy(chooser, "x", num_features=num_features(D), **settings)


def random_policy(seed: int = 0) -> Policy:
    return Policy(RandomChooser(ARMS), "random", seed=seed)


def test_a_fixed_policy_returns_its_arm() -> None:
    decision = Policy(FixedChooser(ARMS, "math"), "fixed:math").choose(context(0))

    assert (decision.arm, decision.propensity) == ("math", 1.0)
    assert decision.policy == "fixed:math"


def test_a_random_policy_is_uniform_and_records_its_propensity() -> None:
    policy = Policy(RandomChooser(ARMS), "random", seed=3)
    decisions = [policy.choose(context(i)) for i in range(1500)]

    counts = Counter(decision.arm for decision in decisions)
    assert all(abs(counts[arm] - 500) < 75 for arm in ARMS)  # four standard deviations
    assert {decision.propensity for decision in decisions} == {1 / 3}
    assert all(sum(d.scores.values()) == pytest.approx(1.0) for d in decisions)


def test_a_drawn_choice_depends_on_the_request_and_not_on_the_order() -> None:
    contexts = [context(i) for i in range(50)]
    forward = [random_policy(seed=1).choose(c).arm for c in contexts]
    policy = random_policy(seed=1)
    backward = [policy.choose(c).arm for c in reversed(contexts)]

    assert forward == backward[::-1]
    assert forward != [random_policy(seed=2).choose(c).arm for c in contexts]
    # the same prompt sent again is another request
    again = [policy.choose(replace(c, request_id=f"again {c.request_id}")).arm for c in contexts]
    assert forward != again


def test_a_learned_policy_takes_the_largest_logit() -> None:
    net, policy, chosen = network(), learned(), set()
    for i in range(40):
        decision = policy.choose(context(i))
        logits = net.logits(with_rows(feature_vector(context(i))[None], 1))[0]
        assert decision.arm == ARMS[int(logits.argmax())]
        assert decision.scores == pytest.approx(dict(zip(ARMS, softmax(logits), strict=True)))
        assert (decision.propensity, decision.policy) == (1.0, "x")
        chosen.add(decision.arm)
    assert len(chosen) > 1


def test_the_chooser_gets_features_and_situation() -> None:
    class Asking(Chooser):
        kind = "asking"
        arms = ARMS

        def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
            self.asked = (features, situation)
            return np.zeros((1, 3))

        @classmethod
        def restore(cls, arms: object, arrays: object, facts: object) -> Asking:
            raise NotImplementedError

    asking = Asking()
    asked = replace(context(3, rows_in_flight=5), max_new_tokens=70, drafters_in_flight={"math": 3})
    Policy(asking, "x", objective="throughput").choose(asked)

    features, situation = asking.asked
    assert np.array_equal(features, feature_vector(asked)[None])
    assert (situation.num_prompt.tolist(), situation.rows) == ([30], 5)
    assert (situation.objective, situation.limits.tolist()) == ("throughput", [70])
    assert list(situation.prompts[0]) == list(asked.prompt_tokens)
    assert situation.drafters_in_flight == {"math": 3}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_hidden_state_does_not_stop_a_request(value: float) -> None:
    broken = context(0)
    broken.mean_hidden[:] = value

    scores = learned().choose(broken).scores

    assert sum(scores.values()) == pytest.approx(1.0)


def test_another_hidden_size_is_refused() -> None:
    wide = np.zeros(D + 1, dtype=np.float32)
    with pytest.raises(ArtefactError, match=r"learned on 14 features.*gives 16.*paceline learn"):
        learned().choose(Context([1], wide, wide, SamplingParams(), 1))


def test_a_policy_needs_distinct_arms() -> None:
    with pytest.raises(ConfigError, match="distinct arms"):
        Policy(RandomChooser(["none", "none"]), "x")
