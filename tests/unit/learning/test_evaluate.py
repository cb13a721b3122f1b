"""Evaluation: figures worked out by hand, and strategies in the order they must come in."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from paceline.costs import CostTable
from paceline.errors import StoreError
from paceline.learning.dataset import Dataset
from paceline.learning.evaluate import (
    BEST_SINGLE,
    ORACLE,
    PER_TASK,
    POLICY,
    RANDOM,
    evaluate,
)
from paceline.learning.rounds import RoundTable
from paceline.selection.choosers import Chooser, Situation

ARMS = ("none", "code", "math")


def dataset(seconds: list[list[float]], domains: list[str], features: list[float]) -> Dataset:
    found = np.array(seconds)
    N = len(found)
    return Dataset(
        arms=ARMS,
        ids=tuple(f"p{i}" for i in range(N)),
        groups=tuple(f"p{i}" for i in range(N)),
        domains=tuple(domains),
        prompts=((1, 2),) * N,
        features=np.array(features, dtype=np.float32)[:, None],
        num_prompt=np.full(N, 2),
        num_tokens=np.full(N, 100),
        limits=np.full(N, 100),
        rounds_per_token=np.ones((N, 3)),
        drafted_per_token=np.zeros((N, 3)),
        seconds=found,
        rewards=found[:, :1] / found,
        spans={},
        rounds=RoundTable(ARMS, np.full(N, 2), ()),
        costs=CostTable({}, []),
        objective="latency",
    )


class BySign(Chooser):
    """Picks by the sign of the only feature."""

    kind = "by sign"

    def __init__(self, negative: str, positive: str) -> None:
        self.arms = ARMS
        self.places = (ARMS.index(negative), ARMS.index(positive))

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        return np.eye(len(ARMS))[np.where(features[:, 0] > 0, *self.places[::-1])]

    @classmethod
    def restore(cls, arms: object, arrays: object, facts: object) -> BySign:
        raise NotImplementedError


def chooses(negative: str, positive: str) -> Chooser:
    return BySign(negative, positive)


TRAIN = dataset([[10, 5, 20], [10, 5, 20], [10, 8, 5]], ["code", "code", "math"], [-1.0, -1.0, 1.0])
HELD_OUT = dataset(
    [[10, 4, 20], [30, 40, 10], [8, 9, 16]], ["code", "math", "math"], [-1.0, 1.0, 1.0]
)


def test_figures_are_those_worked_out_by_hand() -> None:
    report = evaluate(TRAIN, HELD_OUT, chooses("code", "math"))
    arms, strategies = report.overall.arms, report.overall.strategies

    assert report.best_single == "code"
    assert report.per_task == {"code": "code", "math": "math"}
    assert arms["none"].speedup == arms["none"].mean_speedup == 1.0
    assert arms["code"].speedup == pytest.approx(48 / 53)
    assert arms["code"].mean_speedup == pytest.approx((10 / 4 + 30 / 40 + 8 / 9) / 3)
    assert arms["code"].tokens_per_second == pytest.approx(300 / 53)
    assert strategies[BEST_SINGLE] == arms["code"]
    assert strategies[POLICY].speedup == pytest.approx(48 / (4 + 10 + 16))
    assert strategies[POLICY].reward == pytest.approx((10 / 4 + 30 / 10 + 8 / 16) / 3)
    assert strategies[PER_TASK] == strategies[POLICY]
    assert strategies[ORACLE].speedup == pytest.approx(48 / (4 + 10 + 8))
    assert strategies[RANDOM].seconds == pytest.approx((34 + 80 + 33) / 3)
    mean_ratios = [(1 + 10 / 4 + 10 / 20) / 3, (1 + 30 / 40 + 3) / 3, (1 + 8 / 9 + 8 / 16) / 3]
    assert strategies[RANDOM].mean_speedup == pytest.approx(np.mean(mean_ratios))
    assert report.fraction_of_oracle == pytest.approx(22 / 30)
    assert report.regret_seconds == pytest.approx(8 / 3)
    assert report.headline() == {
        POLICY: pytest.approx(48 / 30),
        BEST_SINGLE: pytest.approx(48 / 53),
        ORACLE: pytest.approx(48 / 22),
    }


def test_domains_are_told_apart() -> None:
    report = evaluate(TRAIN, HELD_OUT, chooses("code", "math"))

    assert list(report.by_domain) == ["code", "math"]
    assert report.by_domain["code"].num_prompts == 1
    assert report.by_domain["code"].chosen == {"none": 0.0, "code": 1.0, "math": 0.0}
    assert report.by_domain["math"].chosen == {"none": 0.0, "code": 0.0, "math": 1.0}
    assert report.overall.chosen == pytest.approx({"none": 0, "code": 1 / 3, "math": 2 / 3})
    assert report.by_domain["math"].strategies[POLICY].speedup == pytest.approx(38 / 26)


def test_fixed_strategies_are_fitted_on_the_training_part() -> None:
    """On the held-out part `math` would be the best single arm; nobody could have known."""
    held_out = dataset([[10, 9, 2], [10, 9, 2]], ["code", "new"], [-1.0, 1.0])

    report = evaluate(TRAIN, held_out, chooses("code", "math"))

    assert report.best_single == "code"
    strategies = report.overall.strategies
    assert strategies[BEST_SINGLE].seconds == 18
    assert strategies[PER_TASK].seconds == 18  # a new domain gets the best single arm
    assert report.overall.arms["math"].seconds == strategies[ORACLE].seconds == 4


def test_the_task_label_does_not_reach_the_policy() -> None:
    relabelled = replace(HELD_OUT, domains=("math", "code", "code"))
    network = chooses("code", "math")

    before, after = evaluate(TRAIN, HELD_OUT, network), evaluate(TRAIN, relabelled, network)

    assert before.overall.strategies[POLICY] == after.overall.strategies[POLICY]
    assert before.overall.strategies[PER_TASK] != after.overall.strategies[PER_TASK]


def test_choosing_is_charged_to_the_policy_alone() -> None:
    free = evaluate(TRAIN, HELD_OUT, chooses("code", "math"))
    charged = evaluate(TRAIN, HELD_OUT, chooses("code", "math"), choose_seconds=0.5)

    assert charged.overall.strategies[POLICY].seconds == pytest.approx(30 + 3 * 0.5)
    assert charged.regret_seconds == pytest.approx(free.regret_seconds + 0.5)
    assert charged.policy_over["none"].ratio == pytest.approx(48 / 31.5)
    others = [RANDOM, BEST_SINGLE, PER_TASK, ORACLE]
    assert [charged.overall.strategies[o] for o in others] == [
        free.overall.strategies[o] for o in others
    ]


def many(seed: int, num: int, gain: float) -> Dataset:
    """`code` and `math` take turns in being faster by `gain`; the feature says whose turn it is."""
    rng = np.random.default_rng(seed)
    turn = rng.integers(0, 2, num)
    none = rng.uniform(1, 20, num)
    code = none * rng.uniform(0.4, 0.6, num) * np.where(turn == 0, 1 - gain, 1.0)
    math = none * rng.uniform(0.4, 0.6, num) * np.where(turn == 1, 1 - gain, 1.0)
    seconds = np.stack([none, code, math], axis=1)
    return dataset(seconds.tolist(), ["a"] * num, (turn * 2.0 - 1).tolist())


def test_strategies_come_in_order_and_intervals_hold_their_ratio() -> None:
    report = evaluate(many(0, 200, 0.4), many(1, 200, 0.4), chooses("code", "math"))
    speed = {name: figures.speedup for name, figures in report.overall.strategies.items()}

    assert speed[ORACLE] >= speed[POLICY] > speed[BEST_SINGLE] > speed[RANDOM]
    for name in ("none", BEST_SINGLE, PER_TASK):
        interval = report.policy_over[name]
        assert interval.low < interval.ratio < interval.high
    assert report.policy_over[BEST_SINGLE].low > 1.05
    assert report.policy_over[BEST_SINGLE].ratio == pytest.approx(
        speed[POLICY] / speed[BEST_SINGLE]
    )


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Over many held-out parts, the interval holds the ratio of a very large one."""
    network = chooses("code", "math")
    train = many(0, 50, 0.2)
    truth = evaluate(train, many(1, 20_000, 0.2), network).policy_over["none"].ratio
    found = [evaluate(train, many(2 + i, 60, 0.2), network, seed=i) for i in range(60)]

    covered = sum(r.policy_over["none"].low <= truth <= r.policy_over["none"].high for r in found)
    assert 50 <= covered <= 60


def test_no_gain_is_not_shown_as_one() -> None:
    """A policy that picks the wrong arm each time is behind the best single one, for sure."""
    report = evaluate(many(0, 200, 0.4), many(1, 200, 0.4), chooses("math", "code"))

    assert report.policy_over[BEST_SINGLE].high < 1.0


def test_a_report_is_json_and_repeats_itself() -> None:
    network = chooses("code", "math")
    report = evaluate(TRAIN, HELD_OUT, network, notes=["look out"])
    raw = json.loads(report.to_json())

    assert raw["notes"] == ["look out"]
    assert raw["overall"]["strategies"]["policy"]["speedup"] == pytest.approx(48 / 30)
    assert raw["by_domain"]["math"]["num_prompts"] == 2
    assert report.to_json() == evaluate(TRAIN, HELD_OUT, network, notes=["look out"]).to_json()


def test_another_policys_collection_is_refused() -> None:
    other = replace(HELD_OUT, arms=("none", "code", "lookup"))
    with pytest.raises(StoreError, match=r"none, code, lookup, the policy is for none, code, math"):
        evaluate(TRAIN, other, chooses("code", "math"))
    with pytest.raises(StoreError, match="no prompts"):
        evaluate(TRAIN, HELD_OUT.rows(np.zeros(3, dtype=bool)), chooses("code", "math"))
