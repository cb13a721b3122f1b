"""The threshold moves as published: by eps (1 - beta2) per round, towards the target acceptance."""

from __future__ import annotations

import pytest

from paceline.drafting.draft_length import AdaptiveThreshold, ThresholdSettings

PUBLISHED = ThresholdSettings(target_acceptance=0.8)


def after(
    *rounds: tuple[int, int, bool], settings: ThresholdSettings = PUBLISHED
) -> AdaptiveThreshold:
    exit = AdaptiveThreshold.of(settings)
    for drafted, accepted, full in rounds:
        exit.update(drafted, accepted, full)
    return exit


def test_the_published_constants_are_the_defaults() -> None:
    s = ThresholdSettings()
    assert (s.threshold, s.threshold_step) == (0.6, 0.01)
    assert (s.acceptance_memory, s.threshold_memory) == (0.5, 0.9)
    assert 0.7 <= s.target_acceptance <= 0.9


def test_a_draft_ends_below_the_threshold() -> None:
    exit = after()
    assert exit.ends(0.59)
    assert not exit.ends(0.6)


def test_the_threshold_moves_by_a_thousandth_per_round() -> None:
    assert after((4, 1, False)).threshold == pytest.approx(0.601)
    assert after((4, 4, False)).threshold == pytest.approx(0.599)
    # a low acceptance raises it even if the draft reached the limit
    assert after((4, 1, True)).threshold == pytest.approx(0.601)
    assert after((4, 4, True)).threshold == 0.6
    assert after((0, 0, True)).threshold == 0.6


def test_acceptance_is_remembered() -> None:
    exit = after((4, 4, False), (4, 2, False))
    assert exit.acceptance == pytest.approx(0.75)
    assert exit.threshold == pytest.approx(0.6)
    assert after((4, 4, False), (4, 0, False), (4, 4, False)).acceptance == pytest.approx(0.75)


def test_the_threshold_stays_a_probability() -> None:
    eager = ThresholdSettings(threshold=0.999, threshold_step=1.0, threshold_memory=0.0)
    assert after((4, 0, False), settings=eager).threshold == 1.0
    shy = eager.model_copy(update={"threshold": 0.001})
    assert after((4, 4, False), settings=shy).threshold == 0.0
