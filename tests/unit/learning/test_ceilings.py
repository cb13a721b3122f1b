"""The ceilings: equal to searches over all schedules, and free of what chance would earn an oracle."""

from __future__ import annotations

from time import process_time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.config import LearningSection
from paceline.contracts import split_arm
from paceline.costs import CostTable, Measurement
from paceline.costs.pricing import prompt_seconds, round_seconds
from paceline.learning.dataset import Dataset, build_dataset
from paceline.learning.evaluation import evaluate_chooser
from paceline.learning.evaluation.ceilings import (
    PER_ROUND,
    SPLIT_HALF,
    ceilings,
    left_out,
    per_round,
)
from paceline.learning.evaluation.strategies import ORACLE, POLICY
from paceline.selection.choosers import FixedChooser
from paceline.store.records import CollectedPrompt, ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Sequence

ARMS = ("none", "code@2", "code", "lookup")


def table(starts: float = 0.0) -> CostTable:
    """Build prices that depend on the drafted tokens, the context and the rows."""
    cells = [
        Measurement("target", "forward", n, c, r, 1.0 + 0.1 * n + 0.01 * c + 0.2 * r)
        for n in (1, 9)
        for c in (0, 400)
        for r in (1, 4)
    ]
    cells += [
        Measurement("target", "prefill", 1, 0, 1, 2.0),
        Measurement("engine", "round", 1, 0, 1, 0.1),
    ]
    for name, price in (("code", 0.3), ("lookup", 0.02)):
        cells += [Measurement(name, "propose", n, 0, 1, price * n) for n in (0, 8)]
        cells.append(Measurement(name, "start", 1, 0, 1, starts))
    return CostTable({}, cells)


def prompt_of(
    id: str, tables: dict[str, Any], num_prompt: int = 5, everywhere: bool = True
) -> CollectedPrompt:
    """Build a prompt from [T - 1, 2] drafted and accepted per drafter."""
    positions = len(next(iter(tables.values())))
    return CollectedPrompt(
        id=id,
        domain="",
        prompt_tokens=tuple(range(num_prompt)),
        output_tokens=tuple(range(positions + 1)),
        max_new_tokens=positions + 1,
        features=np.zeros(7, dtype=np.float32),
        replays={
            name: ReplayedDrafter(np.asarray(own).reshape(-1, 2), everywhere)
            for name, own in tables.items()
        },
        draft_outputs={},
    )


def random_prompt(rng: np.random.Generator, id: str, positions: int) -> CollectedPrompt:
    def ahead(longest: int) -> np.ndarray:
        room = np.arange(positions, 0, -1)
        drafted = np.minimum(rng.integers(0, longest + 1, positions), room)
        return np.stack(
            [drafted, np.minimum(rng.integers(0, longest + 1, positions), drafted)], axis=1
        )

    return prompt_of(id, {"code": ahead(4), "lookup": ahead(6)}, int(rng.integers(1, 60)))


def dataset(
    prompts: Sequence[CollectedPrompt], arms: Sequence[str] = ARMS, **costs: float
) -> Dataset:
    return build_dataset(prompts, arms, table(**costs), LearningSection(objective="latency"))[0]


def cheapest(
    prompt: CollectedPrompt, arms: Sequence[str], costs: CostTable, rows: int, place: int
) -> float:
    """Return the seconds of the cheapest of all schedules from a position on, by trying each."""
    if place >= len(prompt.output_tokens) - 1:
        return 0.0
    found = []
    for drafter, length in map(split_arm, arms):
        drafted, accepted = (0, 0) if drafter == "none" else prompt.replays[drafter].table[place]
        drafted, accepted = (min(int(n), length or 99) for n in (drafted, accepted))
        context = len(prompt.prompt_tokens) + place
        price = round_seconds(costs.seconds, drafter, np.array(drafted), np.array(context), rows, 1)
        found.append(float(price) + cheapest(prompt, arms, costs, rows, place + accepted + 1))
    return min(found)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_per_round_oracle_is_the_best_of_all_schedules(rows: int) -> None:
    rng = np.random.default_rng(3)
    prompts = [random_prompt(rng, f"p{i}", i % 8) for i in range(24)]
    data = dataset(prompts)

    found = ceilings(data, rows)[PER_ROUND]

    costs = table()
    for prompt, seconds, num in zip(prompts, found, data.num_prompt, strict=True):
        prefill = float(prompt_seconds(costs.seconds, "none", np.array([num]))[0])
        assert seconds == pytest.approx(prefill + cheapest(prompt, ARMS, costs, rows, 0))
    assert (found <= data.seconds_for(rows).min(axis=1) + 1e-9).all()
    assert (found < 0.95 * data.seconds_for(rows).min(axis=1)).any()  # there is something to find


@pytest.mark.parametrize("among", [("lookup",), ("code",), ()])
def test_the_per_round_oracle_of_some_drafters_takes_no_other(among: tuple[str, ...]) -> None:
    rng = np.random.default_rng(5)
    prompts = [random_prompt(rng, f"p{i}", i % 8) for i in range(24)]
    data = dataset(prompts)
    arms = [arm for arm in ARMS if split_arm(arm)[0] in ("none", *among)]
    costs = table()

    found = per_round(data, among)

    for prompt, seconds, num in zip(prompts, found, data.num_prompt, strict=True):
        prefill = float(prompt_seconds(costs.seconds, "none", np.array([num]))[0])
        assert seconds == pytest.approx(prefill + cheapest(prompt, arms, costs, 1, 0))
    assert (found > ceilings(data)[PER_ROUND] + 1e-6).any()


def test_the_per_round_oracle_refuses_a_drafter_without_replays_everywhere() -> None:
    data = dataset([random_prompt(np.random.default_rng(6), f"p{i}", 8) for i in range(12)])
    with pytest.raises(ValueError, match="not replayed at every position: cascade"):
        per_round(data, ["lookup", "cascade"])


def test_a_ceiling_of_some_prompts_is_that_of_the_same_prompts_among_all() -> None:
    rng = np.random.default_rng(4)
    data = dataset([random_prompt(rng, f"p{i}", 5 + i) for i in range(20)], starts=0.7)
    kept = np.array([11, 2, 7])
    for name, seconds in ceilings(data).items():
        assert ceilings(data.rows(kept))[name] == pytest.approx(seconds[kept])


def steady(accepted: int, positions: int = 40) -> np.ndarray:
    return np.stack([np.full(positions, 4), np.full(positions, accepted)], axis=1)


def test_a_difference_that_both_halves_show_is_within_the_split_half_ceiling() -> None:
    """Where one arm is best throughout, a choice in advance can be as good as the oracle's."""
    prompts = [
        prompt_of(f"p{i}", {"code": steady(4 * (i % 2)), "lookup": steady(4 - 4 * (i % 2))})
        for i in range(12)
    ]
    data = dataset(prompts, starts=0.5)
    assert len(set(data.seconds.argmin(axis=1))) == 2
    assert ceilings(data)[SPLIT_HALF] == pytest.approx(data.seconds.min(axis=1), rel=0.03)


def test_luck_earns_an_oracle_and_not_the_split_half_ceiling() -> None:
    """Ten arms of the same acceptance: any choice in advance is as good as any other."""
    rng = np.random.default_rng(0)
    arms = ["none", *(f"d{i}" for i in range(10))]

    def lucky(positions: int) -> np.ndarray:
        return np.stack([np.full(positions, 4), rng.integers(0, 5, positions)], axis=1)

    prompts = [prompt_of(f"p{i}", {arm: lucky(60) for arm in arms[1:]}) for i in range(150)]
    cells = [*table().measurements]
    for arm in arms[1:]:
        cells += [Measurement(arm, "propose", n, 0, 1, 0.1 * n) for n in (0, 8)]
        cells.append(Measurement(arm, "start", 1, 0, 1, 0.0))
    data = build_dataset(prompts, arms, CostTable({}, cells), LearningSection())[0]

    any_arm = data.seconds[:, 1:].mean()
    assert data.seconds.min(axis=1).mean() < 0.88 * any_arm
    assert ceilings(data)[SPLIT_HALF].mean() == pytest.approx(any_arm, rel=0.01)
    assert ceilings(data)[PER_ROUND].mean() < 0.8 * data.seconds.min(axis=1).mean()


def test_each_half_is_priced_with_the_arm_of_the_other() -> None:
    """`code` is right in the first half only, `lookup` in the second only: both choices are wrong."""
    right, wrong = steady(4, 20), steady(0, 20)
    tables = {"code": np.concatenate([right, wrong]), "lookup": np.concatenate([wrong, right])}
    data = dataset([prompt_of("p", tables)] * 8, ("none", "code", "lookup"))

    found = ceilings(data)[SPLIT_HALF]

    assert (found > data.seconds.max(axis=1)).all()
    costs = table()
    contexts = np.arange(40) + 5
    lookup = round_seconds(costs.seconds, "lookup", np.array(4), contexts[:20])
    code = round_seconds(costs.seconds, "code", np.array(4), contexts[20:])
    assert found[0] == pytest.approx(2.0 + lookup.sum() + code.sum())


def test_answers_too_short_for_two_halves_are_decoded_plainly() -> None:
    prompts = [prompt_of(f"p{n}", {"code": steady(0, n), "lookup": steady(0, n)}) for n in (0, 1)]
    prompts += [
        prompt_of(f"q{i}", {"code": steady(i % 3, 9), "lookup": steady(2, 9)}) for i in range(8)
    ]
    data = dataset(prompts, starts=0.5)
    for seconds in ceilings(data).values():
        assert seconds[:2] == pytest.approx(data.seconds[:2, 0])


def test_drafters_without_replays_everywhere_are_named_and_not_chosen() -> None:
    steps = {"code": steady(2, 39)}
    prompts = []
    for i in range(8):
        prompt = prompt_of(f"p{i}", steps)
        prompt.replays["skip"] = ReplayedDrafter(np.tile([[4, 4]], (8, 1))[:8], everywhere=False)
        prompts.append(prompt)
    cells = [*table().measurements, Measurement("skip", "start", 1, 0, 1, 0.0)]
    cells.append(Measurement("skip", "propose", 1, 0, 1, 1e-3))
    data = build_dataset(
        prompts, ("none", "code", "skip"), CostTable({}, cells), LearningSection()
    )[0]
    assert left_out(data) == ["skip"]
    assert (data.seconds.argmin(axis=1) == 2).all()
    assert (ceilings(data)[PER_ROUND] > data.seconds[:, 2]).all()
    report = evaluate_chooser(data, data, FixedChooser(data.arms, "code"))
    assert "do not choose skip" in report.notes[-1]
    only_rounds = data.rows(np.arange(8))
    assert left_out(only_rounds) == ["skip"]

    none_known = dataset(
        [prompt_of(f"p{i}", steps, everywhere=False) for i in range(8)], ("none", "code")
    )
    assert ceilings(none_known) == {}
    assert (
        POLICY
        in evaluate_chooser(
            none_known, none_known, FixedChooser(none_known.arms, "code")
        ).overall.strategies
    )


def test_ceilings_are_strategies_with_intervals_like_the_others() -> None:
    rng = np.random.default_rng(6)
    data = dataset([random_prompt(rng, f"p{i}", 30) for i in range(60)], starts=0.2)

    report = evaluate_chooser(data, data, FixedChooser(data.arms, "lookup"))

    strategies = report.overall.strategies
    assert list(strategies)[-3:] == [ORACLE, SPLIT_HALF, PER_ROUND]
    none = data.seconds[:, 0].sum()
    for name, seconds in ceilings(data).items():
        figures = strategies[name]
        assert figures.speedup.value == pytest.approx(none / seconds.sum())
        assert figures.speedup.low < figures.speedup.value < figures.speedup.high
        assert figures.mean_speedup == pytest.approx((data.seconds[:, 0] / seconds).mean())
        assert (figures.reward, figures.accuracy, figures.near) == (None, None, None)
        assert report.slowest[name].speedup.value == pytest.approx(figures.speedup.value)
    assert strategies[PER_ROUND].of_oracle > 1.0
    ratio = strategies[POLICY].speedup.value / strategies[SPLIT_HALF].speedup.value
    assert report.over[POLICY][SPLIT_HALF].value == pytest.approx(ratio)
    assert "NaN" not in report.to_json()


def test_six_hundred_prompts_and_fifty_arms_take_seconds() -> None:
    rng = np.random.default_rng(7)
    drafters = [f"d{i}" for i in range(10)]
    arms = ["none", *(f"{d}@{k}" for d in drafters for k in (1, 2, 3, 4)), *drafters]
    cells = [*table().measurements]
    for name in drafters:
        cells += [Measurement(name, "propose", n, 0, 1, 0.1 * n) for n in (0, 8)]
        cells.append(Measurement(name, "start", 1, 0, 1, 0.0))

    def ahead() -> np.ndarray:
        return np.stack([np.full(95, 8), rng.integers(0, 9, 95)], axis=1)

    prompts = [prompt_of(f"p{i}", {d: ahead() for d in drafters}) for i in range(600)]
    data = build_dataset(prompts, arms, CostTable({}, cells), LearningSection())[0]
    ceilings(data.rows(np.arange(2)))  # compiles
    began = process_time()
    ceilings(data)
    assert process_time() - began < 10
