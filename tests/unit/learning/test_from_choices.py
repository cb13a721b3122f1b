"""Learning from choices alone: a log of a policy that explored is enough, no other is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.config import LearningSection
from paceline.contracts import SamplingParams, Seconds
from paceline.drafting.cascade.calibration import load_calibration
from paceline.errors import StoreError
from paceline.learning.from_choices import MIN_CHOICES, NO_PRICES, learn_from_choices
from paceline.selection import PolicyIdentity, load_policy
from paceline.selection.choosers import Situation
from paceline.selection.encoders import build_encoder
from paceline.selection.features import num_features
from paceline.store import LoggedDecision, LogHeader

if TYPE_CHECKING:
    from pathlib import Path

D = 6
ARMS = {"none": "kind=none", "math": "kind=a", "code": "kind=b"}
ENCODE = build_encoder(D)
ENCODERS = ENCODE.identities()
IDENTITY = PolicyIdentity("target-1", "tokens-1", D, ARMS, ENCODERS)
HEADER = LogHeader("target-1", "tokens-1", ARMS, ENCODERS, "off")
SETTINGS = LearningSection(max_epochs=12)
NAMES = list(ARMS)


def log_speeds(features: np.ndarray) -> np.ndarray:
    """Return [n, 3] per arm: `math` is fast where the first feature is high, `code` where it is low."""
    side = 0.5 * np.sign(features[:, 0])
    ease = 0.8 * features[:, 1]  # of the request, whatever the arm
    return np.asarray(ease[:, None] + np.stack([0 * side, side, -side], axis=1))


def served(n: int, seed: int = 0, **changes: Any) -> list[LoggedDecision]:
    """Draw a log of a policy that mostly takes `none` and sometimes the others."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, num_features(D))).astype(np.float32)
    shares = np.array([0.6, 0.2, 0.2])
    chosen = rng.choice(3, size=n, p=shares)
    speeds = np.exp(log_speeds(features)[np.arange(n), chosen] + 0.2 * rng.normal(size=n))
    return [
        replace(
            LoggedDecision(
                header=HEADER,
                time=float(i),
                request_id=str(i),
                policy="exploring",
                arm=NAMES[arm],
                propensity=float(shares[arm]),
                scores={},
                features=row,
                rows_in_flight=1,
                sampling=SamplingParams(),
                has_rules=False,
                max_new_tokens=64,
                num_prompt=9,
                num_output=64,
                rounds=np.zeros((0, 2), dtype=np.int64),
                switches=(),
                seconds=Seconds(),
                seconds_total=64 / float(speed),
                finish_reason="length",
                prompt_tokens=None,
                output_tokens=None,
            ),
            **changes,
        )
        for i, (row, arm, speed) in enumerate(zip(features, chosen, speeds, strict=True))
    ]


def test_the_arm_that_is_fast_is_learned_from_what_was_tried(tmp_path: Path) -> None:
    learned = learn_from_choices(served(2000), IDENTITY, SETTINGS, ENCODE)

    fresh = np.random.default_rng(5).normal(size=(1000, num_features(D))).astype(np.float32)
    speeds = log_speeds(fresh)
    preferred = learned.policy.chooser.preferences(fresh, Situation(np.full(1000, 9)))
    places = [NAMES.index(learned.policy.arms[place]) for place in preferred.argmax(axis=1)]
    picked = speeds[np.arange(1000), places]
    best, served_mean = speeds.max(axis=1).mean(), (speeds @ [0.6, 0.2, 0.2]).mean()
    true_gain = picked.mean() - served_mean
    assert true_gain > 0.85 * (best - served_mean)
    low, high = learned.gain.interval(0.999)
    assert low < true_gain < high and low > 0

    assert learned.card.reward.kind == "clocked" and learned.card.costs == NO_PRICES
    learned.save(tmp_path)
    assert load_calibration(tmp_path) == {}  # cascades draft by assumed chances
    assert load_policy(tmp_path, IDENTITY).id == learned.policy.id


def test_only_a_better_policy_takes_the_place_of_the_current_one() -> None:
    log = served(3000)
    good = learn_from_choices(log, IDENTITY, SETTINGS, ENCODE)
    again = learn_from_choices(log, IDENTITY, SETTINGS, ENCODE, good.policy)  # the same once more
    # one that learned from nothing but noise, with its arms in another order
    other = PolicyIdentity("target-1", "tokens-1", D, dict(reversed(ARMS.items())), ENCODERS)
    noise = [replace(d, seconds_total=1.0 + 0.1 * (i % 7)) for i, d in enumerate(served(400, 3))]
    poor = learn_from_choices(noise, other, SETTINGS, ENCODE)
    better = learn_from_choices(log, IDENTITY, SETTINGS, ENCODE, poor.policy)

    assert good.verdict is None
    assert again.verdict is not None and not again.verdict.adopt and again.verdict.gain == 0
    assert better.verdict is not None and better.verdict.adopt and better.verdict.low > 0.1


def test_where_nothing_is_to_be_gained_nothing_is_promised() -> None:
    flat = [replace(d, seconds_total=1.0 + 0.1 * (i % 7)) for i, d in enumerate(served(800))]

    low, high = learn_from_choices(flat, IDENTITY, SETTINGS, ENCODE).gain.interval(0.999)
    assert low < 0 < high


def test_without_exploration_nothing_can_be_learned() -> None:
    with pytest.raises(StoreError, match=r"500 were chosen with certainty; .* explore > 0"):
        learn_from_choices(served(500, propensity=1.0), IDENTITY, SETTINGS, ENCODE)


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"header": replace(HEADER, target="other")}, "another target"),
    ({"header": replace(HEADER, drafters={**ARMS, "math": "kind=c"})}, "other drafters"),
    (
        {"header": replace(HEADER, encoders={**ENCODERS, "text_stats": "version=0"})},
        "other features",
    ),
    ({"features": None}, "named their drafter"),
    ({"features": np.full(num_features(D), np.nan, dtype=np.float32)}, "no numbers"),
    ({"finish_reason": "cancelled"}, "did not finish"),
    ({"arm": "gone"}, "not configured now"),
]


@pytest.mark.parametrize(("changes", "reason"), UNUSABLE)
def test_what_cannot_be_used_is_left_out_and_counted(changes: dict[str, Any], reason: str) -> None:
    bad = served(7, seed=1, **changes)
    learned = learn_from_choices([*bad, *served(MIN_CHOICES)], IDENTITY, SETTINGS, ENCODE)

    assert len(learned.notes) == 1
    assert learned.notes[0].startswith("7 ") and reason in learned.notes[0]
    with pytest.raises(StoreError, match=f"199 of 206 logged requests .*{reason}"):
        learn_from_choices([*bad, *served(MIN_CHOICES - 1)], IDENTITY, SETTINGS, ENCODE)
