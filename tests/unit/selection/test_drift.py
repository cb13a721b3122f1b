"""The drift alarm on simulated streams: rarely false, and quick when requests change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.contracts import Completion, Decision, RoundStats, Seconds
from paceline.errors import ArtefactError, StoreError
from paceline.selection.drift import (
    MIN_PROMPTS,
    OFTEN,
    RANGE_FILE,
    RARE,
    REQUESTS_PER_FALSE_ALARM,
    Alarm,
    DriftAlarm,
    TrainingRange,
)

if TYPE_CHECKING:
    from pathlib import Path

F = 24
ARMS = ("math", "code@3")


class Tasks:
    """Requests of some tasks; features are correlated, and one of them never varies."""

    def __init__(self, seed: int, num_tasks: int = 4) -> None:
        rng = np.random.default_rng(seed)
        self.middles = rng.normal(size=(num_tasks, F)) * 2
        self.mix = rng.normal(size=(F, F)) / F**0.5

    def features(self, rng: np.random.Generator, task: int, n: int) -> np.ndarray:
        drawn = self.middles[task] + rng.normal(size=(n, F)) @ self.mix
        drawn[:, 0] = 7.0
        return drawn.astype(np.float32)


def acceptance(rng: np.random.Generator, rate: float, n: int) -> np.ndarray:
    """Accepted of 60 drafted, of prompts that differ in how easy they are."""
    ease = rng.beta(20 * rate, 20 * (1 - rate), n)
    return rng.binomial(60, ease)


def trained(tasks: Tasks, seed: int, known: int = 3, n: int = 600) -> TrainingRange:
    rng = np.random.default_rng([seed, 1])
    features = np.concatenate([tasks.features(rng, t, n // known) for t in range(known)])
    return TrainingRange.fit(features, {arm: acceptance(rng, 0.6, n) / 60 for arm in ARMS})


def first_alarm(
    alarm: DriftAlarm, features: np.ndarray, accepted: np.ndarray
) -> tuple[int, Alarm] | None:
    for i, (row, count) in enumerate(zip(features, accepted, strict=True)):
        if found := alarm.observe(row, "math", int(count), 60):
            return i + 1, found
    return None


def test_false_alarms_are_as_rare_as_documented() -> None:
    """Four policies get 10,000 requests each, all in range. At most one alarm per 50,000 requests is
    documented, so less than one is expected.
    """
    raised = 0
    for seed in range(4):
        tasks = Tasks(seed)
        alarm = DriftAlarm(trained(tasks, seed))
        rng = np.random.default_rng([seed, 2])
        stream = np.concatenate([tasks.features(rng, t, 3334) for t in range(3)])
        rng.shuffle(stream)
        stream, accepted = stream[:10_000], acceptance(rng, 0.6, 10_000)
        raised += sum(
            alarm.observe(row, "math", int(count), 60) is not None
            for row, count in zip(stream, accepted, strict=True)
        )
    assert REQUESTS_PER_FALSE_ALARM == 100_000
    assert raised <= 3


@pytest.mark.parametrize(("share", "fewest", "most"), [(RARE, 0, 6), (OFTEN, 1, 200_000)])
def test_the_sum_alarms_at_the_documented_rates(share: float, fewest: int, most: int) -> None:
    """With the tolerated share outside, at most two alarms in 200,000 requests are expected. With
    `OFTEN` outside the alarm comes at once, and again after each recovery.
    """
    alarm = DriftAlarm(TrainingRange(*[np.zeros(1)] * 3, 1.0, {"math": (0.5, 1.0)}))
    outside = np.random.default_rng(0).random(200_000) < share
    raised = [i for i, out in enumerate(outside) if alarm.observe(None, "math", 2 - 2 * out, 2)]

    assert fewest <= len(raised) <= most
    if share == OFTEN:
        assert raised[0] < 100


def test_one_task_of_the_training_alone_is_in_range() -> None:
    for seed in range(6):
        tasks = Tasks(seed)
        alarm = DriftAlarm(trained(tasks, seed))
        rng = np.random.default_rng([seed, 3])
        for task in range(3):
            features = tasks.features(rng, task, 500)
            assert first_alarm(alarm, features, acceptance(rng, 0.6, 500)) is None


def test_a_new_task_raises_the_alarm_within_a_few_requests() -> None:
    for seed in range(10):
        tasks = Tasks(seed)
        alarm = DriftAlarm(trained(tasks, seed))
        rng = np.random.default_rng([seed, 4])
        assert first_alarm(alarm, tasks.features(rng, 0, 300), acceptance(rng, 0.6, 300)) is None
        found = first_alarm(alarm, tasks.features(rng, 3, 50), acceptance(rng, 0.6, 50))
        assert found is not None and found[1].arm is None and found[0] <= 15
        assert found[1].outside <= found[1].requests


@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_falling_or_rising_acceptance_raises_the_alarm(rate: float) -> None:
    for seed in range(10):
        tasks = Tasks(seed)
        alarm = DriftAlarm(trained(tasks, seed))
        rng = np.random.default_rng([seed, 5])
        features = tasks.features(rng, 1, 100)
        found = first_alarm(alarm, features, acceptance(rng, rate, 100))
        assert found is not None and found[1].arm == "math" and found[0] <= 40
        assert "acceptance of 'math' left the range" in str(found[1])


def test_an_alarm_is_raised_once_and_again_after_a_recovery() -> None:
    tasks = Tasks(0)
    alarm = DriftAlarm(trained(tasks, 0))
    rng = np.random.default_rng(6)

    def raised(task: int, n: int) -> int:
        rows = tasks.features(rng, task, n)
        return sum(alarm.observe(row, "none", 0, 0) is not None for row in rows)

    assert raised(3, 200) == 1
    assert raised(0, 200) == 0
    assert raised(3, 200) == 1


def test_requests_without_drafts_or_of_unknown_arms_are_not_counted() -> None:
    alarm = DriftAlarm(trained(Tasks(0), 0))

    for _ in range(100):
        assert alarm.observe(None, "math", 0, 0) is None  # nothing was drafted
        assert alarm.observe(None, "unknown", 0, 60) is None


def test_a_completion_counts_its_acceptance_only_where_one_arm_decoded_it_as_chosen() -> None:
    everything = TrainingRange(*[np.zeros((1, F))] * 3, np.inf, {"math": (0.5, 1.0)})

    def num_alarms(policy: str, features: np.ndarray | None, *switches: tuple[int, str]) -> int:
        alarm = DriftAlarm(everything)
        decision = Decision("math", policy=policy, features=features)
        completion = Completion(
            "0", [], "", "length", "math", decision, [RoundStats(4, 0)], Seconds(), 1.0, 3, 0,
            switches=list(switches),
        )  # fmt: skip
        return sum(alarm.observe_completion(completion) is not None for _ in range(50))

    features = np.zeros(F, dtype=np.float32)
    assert num_alarms("linear:1", features) == 1
    assert num_alarms("linear:1", features, (3, "none")) == 0
    assert num_alarms("linear:1, adjusted", features) == 0
    assert num_alarms("linear:1", None) == 0


def test_features_that_are_not_numbers_are_outside() -> None:
    alarm = DriftAlarm(trained(Tasks(0), 0))

    assert any(alarm.observe(np.full(F, np.nan), "none", 0, 0) for _ in range(20))


def test_arms_are_monitored_separately() -> None:
    alarm = DriftAlarm(trained(Tasks(0), 0))
    found = [alarm.observe(None, ARMS[i % 2], 36 if i % 2 else 3, 60) for i in range(40)]

    assert {a.arm for a in found if a} == {"math"}


def test_a_range_is_read_back_and_damage_is_refused(tmp_path: Path) -> None:
    saved = trained(Tasks(0), 0)
    saved.save(tmp_path)
    loaded = TrainingRange.load(tmp_path)

    row = Tasks(0).features(np.random.default_rng(0), 1, 1)[0]
    assert loaded.distance(row) == saved.distance(row)
    assert (loaded.farthest, loaded.acceptance) == (saved.farthest, saved.acceptance)
    path = tmp_path / RANGE_FILE
    path.write_bytes(path.read_bytes()[:-5])
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ArtefactError, match="no training range to monitor"):
            TrainingRange.load(folder)


def test_too_few_prompts_are_refused_and_rare_arms_are_not_monitored() -> None:
    features = Tasks(0).features(np.random.default_rng(0), 0, 2 * MIN_PROMPTS)
    few = TrainingRange.fit(features, {"math": np.ones(MIN_PROMPTS - 1)})

    assert few.acceptance == {}
    with pytest.raises(StoreError, match="at least 40 prompts"):
        TrainingRange.fit(features[1:], {})
    with pytest.raises(StoreError, match="finite"):
        TrainingRange.fit(np.where(features > 100, features, np.nan), {})


def test_the_distance_is_from_the_nearest_centre() -> None:
    """The reference: root mean square of the standardised differences from the nearest centre."""
    range_ = trained(Tasks(0), 0)
    rng = np.random.default_rng(1)
    for row in rng.normal(size=(20, F)).astype(np.float32) * 5:
        inputs = np.clip((row - range_.mean) * range_.scale, -3, 3)
        expected = min(np.sqrt(np.mean((inputs - centre) ** 2)) for centre in range_.centres)
        assert range_.distance(row) == pytest.approx(expected, rel=1e-5)
    alone = replace(range_, centres=range_.centres[:1])
    assert alone.distance(row) >= range_.distance(row)
