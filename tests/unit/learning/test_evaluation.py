"""Evaluation: figures computed by hand, intervals that hold the truth, strategies in their order."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from paceline.errors import StoreError
from paceline.intervals import RESAMPLES
from paceline.learning.evaluation.bootstrap import interval, resample
from paceline.learning.evaluation.report import EvaluationReport, evaluate
from paceline.learning.evaluation.sections import FirstLines
from paceline.learning.evaluation.strategies import (
    BEST_SINGLE,
    FIRST_LINE,
    ORACLE,
    PER_TASK,
    POLICY,
    RANDOM,
    Outcomes,
)

ARMS = ("none", "code", "math")


def outcomes(seconds: list[list[float]], domains: list[str], lines: str = "") -> Outcomes:
    """Build outcomes. lines: one letter per prompt, its first line."""
    found = np.array(seconds, dtype=np.float64).reshape(len(seconds), -1)
    return Outcomes(
        arms=ARMS,
        domains=tuple(domains),
        seconds=found,
        rewards=found[:, :1] / found,
        num_tokens=np.full(len(found), 100),
        first_lines=tuple(lines),
    )


def takes(*arms: str) -> list[np.ndarray]:
    """Build a policy of one training that gives these arms to the prompts."""
    return [np.eye(len(ARMS))[[ARMS.index(arm) for arm in arms]]]


TRAIN = outcomes([[10, 5, 20], [10, 5, 20], [10, 8, 5]], ["code", "code", "math"], "ccm")
HELD_OUT = outcomes([[10, 4, 20], [30, 40, 10], [8, 9, 16]], ["code", "math", "math"], "cmx")
BY_TASK = {POLICY: takes("code", "math", "math")}


def test_figures_are_those_worked_out_by_hand() -> None:
    report = evaluate(TRAIN, HELD_OUT, BY_TASK)
    arms, strategies = report.overall.arms, report.overall.strategies

    assert report.best_single == "code"
    assert report.per_task == {"code": "code", "math": "math"}
    assert arms["none"].speedup.value == arms["none"].mean_speedup == 1.0
    assert arms["code"].speedup.value == pytest.approx(48 / 53)
    assert arms["code"].mean_speedup == pytest.approx((10 / 4 + 30 / 40 + 8 / 9) / 3)
    assert arms["code"].tokens_per_second == pytest.approx(300 / 53)
    assert strategies[BEST_SINGLE] == arms["code"]
    assert strategies[POLICY].speedup.value == pytest.approx(48 / (4 + 10 + 16))
    assert strategies[POLICY].reward == pytest.approx((10 / 4 + 30 / 10 + 8 / 16) / 3)
    assert strategies[PER_TASK] == strategies[POLICY]
    assert strategies[FIRST_LINE].seconds == pytest.approx(4 + 10 + 9)  # `x` gets the best single
    assert report.known_first_lines == pytest.approx(2 / 3)
    assert strategies[ORACLE].speedup.value == pytest.approx(48 / (4 + 10 + 8))
    assert strategies[ORACLE].regret.value == 0.0
    assert strategies[RANDOM].seconds == pytest.approx((34 + 80 + 33) / 3)
    mean_ratios = [(1 + 10 / 4 + 10 / 20) / 3, (1 + 30 / 40 + 3) / 3, (1 + 8 / 9 + 8 / 16) / 3]
    assert strategies[RANDOM].mean_speedup == pytest.approx(np.mean(mean_ratios))
    assert strategies[RANDOM].accuracy == pytest.approx(1 / 3)
    assert strategies[POLICY].accuracy == pytest.approx(2 / 3)
    assert strategies[POLICY].regret.value == pytest.approx(8 / 22)
    assert strategies[POLICY].regret_seconds.value == pytest.approx(8 / 3)
    assert report.fraction_of_oracle == pytest.approx(22 / 30)
    assert report.over[POLICY][FIRST_LINE].value == pytest.approx(23 / 30)
    assert report.slowest[POLICY].task == "math"
    assert report.slowest[POLICY].speedup.value == pytest.approx(38 / 26)
    assert report.slowest[BEST_SINGLE].speedup.value == pytest.approx(38 / 49)
    assert report.headline() == {
        POLICY: pytest.approx(48 / 30),
        BEST_SINGLE: pytest.approx(48 / 53),
        ORACLE: pytest.approx(48 / 22),
    }


def test_an_arm_within_two_percent_of_the_fastest_is_near_it() -> None:
    held_out = outcomes([[10, 9.81, 20], [10, 9.79, 20]], ["a", "a"])

    figures = evaluate(TRAIN, held_out, {POLICY: takes("none", "none")}).overall.strategies[POLICY]

    assert (figures.accuracy, figures.near) == (0.0, 0.5)  # 1.9% more, 2.1% more


def test_domains_are_told_apart() -> None:
    report = evaluate(TRAIN, HELD_OUT, BY_TASK)

    assert list(report.by_domain) == ["code", "math"]
    assert report.by_domain["code"].num_prompts == 1
    assert report.by_domain["code"].chosen[POLICY].arms == {"none": 0, "code": 1, "math": 0}
    assert report.by_domain["math"].chosen[POLICY].arms == {"none": 0, "code": 0, "math": 1}
    chosen = report.overall.chosen[POLICY]
    assert chosen.arms == pytest.approx({"none": 0, "code": 1 / 3, "math": 2 / 3})
    assert report.by_domain["math"].strategies[POLICY].speedup.value == pytest.approx(38 / 26)


def test_fixed_strategies_are_fitted_on_the_training_part() -> None:
    """On the held-out part `math` would be the best single arm, which the training part cannot tell."""
    held_out = outcomes([[10, 9, 2], [10, 9, 2]], ["code", "new"], "cn")

    report = evaluate(TRAIN, held_out, {POLICY: takes("code", "math")})

    assert report.best_single == "code"
    strategies = report.overall.strategies
    assert strategies[BEST_SINGLE].seconds == 18
    assert strategies[PER_TASK].seconds == 18  # a new domain gets the best single arm
    assert strategies[FIRST_LINE].seconds == 18
    assert report.overall.arms["math"].seconds == strategies[ORACLE].seconds == 4


def test_a_drafter_is_shown_at_the_length_that_was_best_in_training() -> None:
    arms = ("none", "code", "code@2", "math@3", "math@8")
    train = replace(outcomes([[10, 6, 5, 9, 8]], ["a"]), arms=arms, rewards=np.ones((1, 5)))
    held_out = replace(train, seconds=np.array([[10.0, 1, 5, 2, 8]]))
    distribution = np.eye(5)[[3]]

    report = evaluate(train, held_out, {POLICY: [distribution]})

    assert list(report.overall.arms) == ["none", "code@2", "math@8"]
    assert report.overall.arms["code@2"].seconds == 5
    chosen = report.overall.chosen[POLICY]
    assert chosen.drafters == {"none": 0, "code": 0, "math": 1}
    assert chosen.lengths == {"-": 0, "own": 0, "2": 0, "3": 1, "8": 0}


def test_the_task_label_does_not_reach_the_policy() -> None:
    relabelled = replace(HELD_OUT, domains=("math", "code", "code"))

    before, after = evaluate(TRAIN, HELD_OUT, BY_TASK), evaluate(TRAIN, relabelled, BY_TASK)

    policy = after.overall.strategies[POLICY]
    assert before.overall.strategies[POLICY].seconds == policy.seconds
    assert before.overall.strategies[PER_TASK].seconds != after.overall.strategies[PER_TASK].seconds


def test_choosing_is_charged_to_the_policy_alone() -> None:
    free = evaluate(TRAIN, HELD_OUT, BY_TASK)
    charged = evaluate(TRAIN, HELD_OUT, BY_TASK, choose_seconds={POLICY: 0.5})

    assert charged.overall.strategies[POLICY].seconds == pytest.approx(30 + 3 * 0.5)
    regret = charged.overall.strategies[POLICY].regret_seconds.value
    assert regret == pytest.approx(free.overall.strategies[POLICY].regret_seconds.value + 0.5)
    assert charged.over[POLICY]["none"].value == pytest.approx(48 / 31.5)
    assert charged.by_seed[POLICY] == (pytest.approx(48 / 31.5),)
    others = [RANDOM, BEST_SINGLE, PER_TASK, FIRST_LINE, ORACLE]
    assert [charged.overall.strategies[o] for o in others] == [
        free.overall.strategies[o] for o in others
    ]


def test_a_policy_of_several_trainings_is_their_mean() -> None:
    trained = [*takes("code", "math", "math"), *takes("none", "none", "none")]

    report = evaluate(TRAIN, HELD_OUT, {POLICY: trained})

    assert report.by_seed[POLICY] == (pytest.approx(48 / 30), pytest.approx(1.0))
    assert report.overall.strategies[POLICY].seconds == pytest.approx((30 + 48) / 2)
    assert report.overall.strategies[POLICY].accuracy == pytest.approx((2 + 1) / 6)
    assert report.overall.chosen[POLICY].arms["none"] == pytest.approx(1 / 2)


def many(
    seed: int, num: int, gain: float, tasks: int = 1
) -> tuple[Outcomes, dict[str, list[np.ndarray]]]:
    """Draw prompts on which `code` or `math` is faster by `gain`, and a policy that knows which.

    Prompts differ far more in length than arms do in speed.
    """
    rng = np.random.default_rng(seed)
    turn = rng.integers(0, 2, num)
    none = rng.uniform(1, 20, num)
    code = none * rng.uniform(0.4, 0.6, num) * np.where(turn == 0, 1 - gain, 1.0)
    math = none * rng.uniform(0.4, 0.6, num) * np.where(turn == 1, 1 - gain, 1.0)
    seconds = np.stack([none, code, math], axis=1)
    domains = [f"task {i % tasks}" for i in range(num)]
    return outcomes(seconds.tolist(), domains), {POLICY: [np.eye(3)[turn + 1]]}


def test_strategies_come_in_order_and_intervals_hold_their_figure() -> None:
    held_out, policy = many(1, 200, 0.2, tasks=3)
    report = evaluate(many(0, 200, 0.2)[0], held_out, policy)
    strategies = report.overall.strategies
    speed = {name: figures.speedup.value for name, figures in strategies.items()}

    assert speed[ORACLE] >= speed[POLICY] > speed[BEST_SINGLE] > speed[RANDOM]
    intervals = [*report.over[POLICY].values(), strategies[POLICY].speedup]
    intervals += [strategies[POLICY].regret, strategies[POLICY].regret_seconds]
    for found in intervals:
        assert found.low < found.value < found.high
    assert report.over[POLICY][BEST_SINGLE].low > 1.05
    ratio = speed[POLICY] / speed[BEST_SINGLE]
    assert report.over[POLICY][BEST_SINGLE].value == pytest.approx(ratio)
    # the least of three tasks is less than any of them, more often than not
    slowest = report.slowest[POLICY]
    own = report.by_domain[slowest.task].strategies[POLICY].speedup
    assert slowest.speedup.value == own.value
    assert slowest.speedup.low <= own.low and slowest.speedup.high < own.high


def covering(reports: list[EvaluationReport], truth: EvaluationReport) -> dict[str, int]:
    """Count the reports that hold the truth in their interval, by figure."""
    figures = {
        "over none": lambda r: r.over[POLICY]["none"],
        "over best single": lambda r: r.over[POLICY][BEST_SINGLE],
        "regret": lambda r: r.overall.strategies[POLICY].regret,
        "regret seconds": lambda r: r.overall.strategies[POLICY].regret_seconds,
    }
    return {
        name: sum(get(r).low <= get(truth).value <= get(r).high for r in reports)
        for name, get in figures.items()
    }


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Over many held-out parts, each interval holds the figure of a very large one."""
    train = many(0, 50, 0.2)[0]
    truth = evaluate(train, *many(1, 20_000, 0.2))
    found = [evaluate(train, *many(2 + i, 60, 0.2), seed=i) for i in range(40)]

    for name, covered in covering(found, truth).items():
        assert 33 <= covered <= 40, name


def test_a_comparison_is_paired_by_prompt() -> None:
    """Two strategies that differ by 2% on every prompt differ by 2%, whatever the prompts' lengths."""
    rng = np.random.default_rng(0)
    none = rng.lognormal(0.0, 2.0, 100)
    seconds = np.stack([none, none * 0.50, none * 0.49], axis=1)
    held_out = outcomes(seconds.tolist(), ["a"] * 100)
    train = outcomes([[10, 4, 5]], ["a"])  # here `code` was better

    over = evaluate(train, held_out, {POLICY: takes(*["math"] * 100)}).over[POLICY]

    assert over[BEST_SINGLE].low == pytest.approx(50 / 49)
    assert over[BEST_SINGLE].high == pytest.approx(50 / 49)


def test_no_gain_is_not_shown_as_one() -> None:
    """A policy that picks the wrong arm each time is slower than the best single arm, significantly."""
    held_out, policy = many(1, 200, 0.4)
    wrong = policy[POLICY][0][:, [0, 2, 1]]
    report = evaluate(many(0, 200, 0.4)[0], held_out, {POLICY: [wrong]})

    assert report.over[POLICY][BEST_SINGLE].high < 1.0


def test_a_resample_is_one_of_prompts_with_repetition() -> None:
    columns = np.arange(1.0, 6.0)[:, None]
    found = resample(columns, ["a", "a", "b", "b", "b"], seed=0)

    assert found.tasks == ("a", "b")
    assert found.num.tolist() == [2, 3]
    assert found.sums[:, 0].tolist() == [3, 12]
    assert found.drawn.shape == (RESAMPLES, 2, 1)
    assert (found.draws.sum(axis=1) == 5).all()
    assert len(np.unique(found.draws[:, 0])) == 6  # from no prompt of `a` to all
    totals = found.drawn.sum(axis=(1, 2))
    assert totals.mean() == pytest.approx(15, rel=0.02)
    assert totals.std() == pytest.approx(np.sqrt(5 * 2.0), rel=0.06)  # five draws, variance 2 each


def test_a_task_that_a_resample_lacks_is_left_out_of_it() -> None:
    found = interval(2.0, np.array([np.nan, 1.0, 2.0, 3.0]))
    assert (found.low, found.high) == (pytest.approx(1.05), pytest.approx(2.95))

    seconds = [[10, 5, 20]] * 30 + [[10, 40, 20]]
    held_out = outcomes(seconds, ["often"] * 30 + ["seldom"])
    report = evaluate(TRAIN, held_out, {POLICY: takes(*["code"] * 31)})
    assert report.slowest[POLICY].task == "seldom"
    # a third of the resamples does not hold the one prompt that is slow
    assert report.slowest[POLICY].speedup.low == pytest.approx(0.25)
    assert report.slowest[POLICY].speedup.high == pytest.approx(2.0)


def test_a_report_is_json_and_repeats_itself() -> None:
    report = evaluate(TRAIN, HELD_OUT, BY_TASK, notes=["look out"])
    raw = json.loads(report.to_json())

    assert raw["notes"] == ["look out"]
    assert raw["overall"]["strategies"]["policy"]["speedup"]["value"] == pytest.approx(48 / 30)
    assert raw["by_domain"]["math"]["num_prompts"] == 2
    assert report.to_json() == evaluate(TRAIN, HELD_OUT, BY_TASK, notes=["look out"]).to_json()


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(StoreError, match=r"chose for 3 prompts among 2 arms, there are 3 and 3"):
        evaluate(TRAIN, HELD_OUT, {POLICY: [np.ones((3, 2))]})
    with pytest.raises(StoreError, match="have the arms none, code, maths, those to learn from"):
        evaluate(TRAIN, replace(HELD_OUT, arms=("none", "code", "maths")), BY_TASK)
    with pytest.raises(StoreError, match="no prompts"):
        evaluate(TRAIN, replace(HELD_OUT, domains=()), BY_TASK)


def words(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def text(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def test_first_lines_leave_out_what_all_prompts_begin_with() -> None:
    train = [words(f"<user>\n{line}\nText {i}.") for i, line in enumerate(["Solve:", "Say:"])]
    lines = FirstLines(train, text)

    assert lines.of(train) == ("olve:", "ay:")  # the S is shared, and tells nothing
    # another beginning is not cut into
    assert lines.of([words("Solve:\nText")]) == ("Solve:",)
    assert lines.of([words("  \n\nSolve:"), words("")]) == ("Solve:", "")
