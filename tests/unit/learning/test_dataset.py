"""Datasets: prices and rewards in their columns, and clear refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.config import LearningSection
from paceline.costs import CostTable, Measurement
from paceline.errors import ConfigError, StoreError
from paceline.learning.dataset import build_dataset, split
from paceline.replay import rounds_of
from paceline.rewards import alignments, request_seconds, savings
from paceline.store.records import ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.learning.dataset import Dataset
    from paceline.store.records import CollectedPrompt

ARMS = ("none", "code", "lookup")
SPEED, ALIGNMENT = LearningSection(), LearningSection(reward="alignment", alpha=0.25)


@pytest.fixture
def prompts(collected: Callable[..., CollectedPrompt]) -> list[CollectedPrompt]:
    rng = np.random.default_rng(0)
    return [
        collected(
            f"p{i}",
            {"code": i % 4, "lookup": (i * 7) % 5},
            rng.normal(size=10),
            domain="even" if i % 2 == 0 else "odd",
            prompt_tokens=tuple(range(5 + i)),
        )
        for i in range(20)
    ]


@pytest.fixture
def costs(cost_table: Callable[..., CostTable]) -> CostTable:
    return cost_table(["code", "lookup"])


def test_rows_are_prompts_and_columns_are_arms(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    data, notes = build_dataset(prompts, ARMS, costs, SPEED)

    assert notes == []
    assert (data.arms, len(data)) == (ARMS, 20)
    assert data.ids == tuple(f"p{i}" for i in range(20))
    assert set(data.domains) == {"even", "odd"}
    assert np.array_equal(data.features, np.stack([p.features for p in prompts]))
    assert data.features.dtype == np.float32
    assert set(data.num_tokens) == {41}
    # prefill, then 40 rounds of 1.5; with a drafter 20 rounds of 2 and its start
    row = next(i for i, p in enumerate(prompts) if len(rounds_of(p, "code")) == 20)
    assert data.seconds[row, 0] == pytest.approx(2.0 + 40 * 1.5)
    assert data.seconds[row, 1] == pytest.approx(2.0 + 0.25 + 20 * 2.0)


def test_rates_count_tokens_after_the_first(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    data, _ = build_dataset(prompts, ARMS, costs, SPEED)

    assert (data.rounds_per_token[:, 0] == 1.0).all()
    assert (data.drafted_per_token[:, 0] == 0.0).all()
    assert (data.empty_per_token[:, 0] == 1.0).all()
    row = next(i for i, p in enumerate(prompts) if len(rounds_of(p, "code")) == 20)
    assert data.rounds_per_token[row, 1] == 20 / 40
    assert data.drafted_per_token[row, 1] == 20 * 4 / 40
    assert data.empty_per_token[row, 1] == 0.0


def test_rounds_that_draft_nothing_are_counted_apart(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    """Of 40 tokens, five rounds of four tokens drafted and three accepted, the rest one by one."""
    now_and_then = np.array([(4, 3), (0, 0), (0, 0), (0, 0), (0, 0)] * 5)
    replays = {**prompts[0].replays, "code": ReplayedDrafter(now_and_then, everywhere=False)}
    data, _ = build_dataset(
        [replace(prompts[0], replays=replays), *prompts[1:]], ARMS, costs, SPEED
    )

    column = ARMS.index("code")
    assert data.rounds_per_token[0, column] == 25 / 40
    assert data.drafted_per_token[0, column] == 20 / 40
    assert data.empty_per_token[0, column] == 20 / 40


def test_some_of_the_prompts_are_priced_as_among_all(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    data, _ = build_dataset(prompts, ARMS, costs, SPEED)
    chosen = np.array([7, 2, 19])

    part = data.rows(chosen)

    assert part.ids == tuple(data.ids[i] for i in chosen)
    for rows in (1, 4):
        assert part.seconds_for(rows) == pytest.approx(data.seconds_for(rows)[chosen])


def test_the_speed_reward_is_the_share_of_all_seconds_that_is_saved(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    data, _ = build_dataset(prompts, ARMS, costs, SPEED)

    plain = data.seconds[:, 0]
    for row, prompt in zip(data.rewards, prompts, strict=True):
        own = {
            arm: request_seconds(
                costs.seconds, arm, len(prompt.prompt_tokens), rounds_of(prompt, arm)
            )
            for arm in ARMS
        }
        expected = [(own["none"] - own[arm]) / plain.mean() for arm in ARMS]
        assert row == pytest.approx(expected)
    assert data.rewards.mean(axis=0) == pytest.approx(1 - data.seconds.sum(axis=0) / plain.sum())


def test_the_arm_with_the_largest_mean_reward_takes_the_least_time() -> None:
    """An arm twice as fast on two short answers and a third slower on a long one is slower in all."""
    seconds = np.array([[2.0, 1.0], [2.0, 1.0], [30.0, 40.0]])
    assert (seconds[:, 0] / seconds[:, 1]).mean() > 1.5
    assert savings(seconds, 0).mean(axis=0).tolist() == pytest.approx([0.0, -8 / 34])


def with_outputs(prompt: CollectedPrompt, *arms: str) -> CollectedPrompt:
    own = {arm: prompt.output_tokens[: 5 + len(arm)] for arm in arms}
    return replace(prompt, draft_outputs=own)


def test_the_alignment_reward_is_that_of_rewards(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    writing = [with_outputs(p, "code", "lookup") for p in prompts]
    data, notes = build_dataset(writing, ARMS, costs, ALIGNMENT)

    assert not any("no text of its own" in note for note in notes)
    for row, p in zip(data.rewards, writing, strict=True):
        expected = alignments(
            costs.seconds, 0.25, len(p.prompt_tokens), p.output_tokens, p.draft_outputs
        )
        assert dict(zip(ARMS, row, strict=True)) == pytest.approx(expected)


def test_an_arm_without_a_text_has_similarity_zero_and_a_note(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    writing = [with_outputs(p, "code") for p in prompts]
    data, notes = build_dataset(writing, ARMS, costs, ALIGNMENT)

    assert "'lookup' writes no text of its own" in notes[0]
    saved = 1 - 0.5 / 1.0  # a propose of 0.5 where the target's forward takes 1
    assert data.rewards[:, 2] == pytest.approx(0.25 * 0.0 + 0.75 * saved)


def test_texts_of_drafters_that_are_not_configured_are_left_out(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    writing = [with_outputs(p, "code", "lookup") for p in prompts]
    data, _ = build_dataset(writing, ARMS, costs, ALIGNMENT)
    more = [with_outputs(p, "code", "lookup", "black-box") for p in prompts]
    found, notes = build_dataset(more, ARMS, costs, ALIGNMENT)

    assert np.array_equal(found.rewards, data.rewards)
    assert any("the texts of black-box are left out" in note for note in notes)


def test_an_order_of_arms_is_kept(prompts: list[CollectedPrompt], costs: CostTable) -> None:
    data, _ = build_dataset(prompts, ARMS, costs, SPEED)
    turned, _ = build_dataset(prompts, ARMS[::-1], costs, SPEED)

    assert np.array_equal(turned.rewards, data.rewards[:, ::-1])


def dropped(prompt: CollectedPrompt, arm: str) -> CollectedPrompt:
    return replace(prompt, replays={a: r for a, r in prompt.replays.items() if a != arm})


def test_refusals_say_what_to_do(prompts: list[CollectedPrompt], costs: CostTable) -> None:
    def build(
        changed: list[CollectedPrompt],
        arms: tuple[str, ...] = ARMS,
        settings: LearningSection = SPEED,
    ) -> None:
        build_dataset(changed, arms, costs, settings)

    first, rest = prompts[0], prompts[1:]
    with pytest.raises(ConfigError, match=r"at least one drafter, there is only none; add a"):
        build(prompts, ("none",))
    with pytest.raises(StoreError, match=r"7 prompts are too few.*at least 8.*paceline collect"):
        build(prompts[:7])
    with pytest.raises(StoreError, match=r"'code' was not replayed on prompt 'p0'"):
        build([dropped(first, "code"), *rest])
    with pytest.raises(StoreError, match=r"prompt 'p1' has features of shape \(10,\), 'p0' of"):
        build([replace(first, features=np.zeros(4, dtype=np.float32)), *rest])
    broken = first.features.copy()
    broken[3] = np.nan
    with pytest.raises(StoreError, match=r"prompt 'p0' is not a finite number.*another dtype"):
        build([replace(first, features=broken), *rest])
    with pytest.raises(
        StoreError, match=r"collection has none; run `paceline collect PROMPTS --align"
    ):
        build(prompts, settings=ALIGNMENT)
    partly = [prompts[0], *(with_outputs(p, "code") for p in rest)]
    with pytest.raises(StoreError, match=r"prompt 'p0' has no text of 'code'"):
        build(partly, settings=ALIGNMENT)


def test_equal_rewards_everywhere_are_refused(
    collected: Callable[..., CollectedPrompt],
) -> None:
    """An arm that never drafts and costs nothing is `none` under another name."""
    prompts = [collected(f"p{i}", {}, np.arange(3) + i) for i in range(10)]
    idle = ReplayedDrafter(np.zeros((40, 2), dtype=np.int64), everywhere=True)
    twins = [replace(p, replays={"code": idle}) for p in prompts]
    work = [("target", "prefill", 1.0), ("target", "forward", 1.0), ("engine", "round", 0.0)]
    work += [("code", "start", 0.0), ("code", "propose", 0.0)]
    free = CostTable({}, [Measurement(s, o, 1, 0, 1, seconds) for s, o, seconds in work])

    with pytest.raises(StoreError, match=r"same reward on every prompt.*nothing to choose"):
        build_dataset(twins, ("none", "code"), free, SPEED)


def test_one_arm_that_is_always_best_is_noted(
    collected: Callable[..., CollectedPrompt], costs: CostTable
) -> None:
    prompts = [collected(f"p{i}", {"code": 3, "lookup": 1}, np.arange(3) + i) for i in range(10)]

    _, notes = build_dataset(prompts, ARMS, costs, SPEED)

    assert notes == ["'code' is best on every prompt: one arm would do"]


def numbered(tabled: Callable[..., Dataset], ids: list[str]) -> Dataset:
    """Build a dataset in which every value of a prompt is its place."""
    index = np.arange(len(ids))
    seconds = np.stack([index + 1.0, index + 2.0], axis=1)
    return tabled(
        ("none", "code"), index[:, None], ids=tuple(ids), num_tokens=index, seconds=seconds
    )


def test_the_split_follows_the_id_not_the_order(tabled: Callable[..., Dataset]) -> None:
    ids = [f"p{i}" for i in range(200)]
    train, held_out = split(numbered(tabled, ids), 0.25)
    train_again, held_out_again = split(numbered(tabled, ids[::-1]), 0.25)

    assert set(train.ids).isdisjoint(held_out.ids)
    assert len(train) + len(held_out) == 200
    assert 30 <= len(held_out) <= 70
    assert set(held_out.ids) == set(held_out_again.ids)
    assert set(train.ids) == set(train_again.ids)
    # every array goes along with its id
    for part in (train, held_out):
        numbers = [int(id[1:]) for id in part.ids]
        assert part.num_tokens.tolist() == part.features[:, 0].tolist() == numbers
        assert part.seconds[:, 0].tolist() == [n + 1.0 for n in numbers]


def test_rows_of_one_prompt_are_not_split(tabled: Callable[..., Dataset]) -> None:
    """A prompt's greedy and sampled rows stay in one part, since one row predicts the other."""
    ids = [f"p{i}" for i in range(100)] + [f"p{i}@t0.8" for i in range(100)]
    groups = tuple(id.partition("@")[0] for id in ids)
    train, held_out = split(replace(numbered(tabled, ids), groups=groups), 0.25)

    assert set(train.groups).isdisjoint(held_out.groups)
    assert {f"{id}@t0.8" for id in held_out.ids} & set(train.ids) == set()
    assert len(held_out) % 2 == 0


def test_a_split_that_leaves_too_few_is_refused(tabled: Callable[..., Dataset]) -> None:
    with pytest.raises(StoreError, match=r"of 10 prompts 0 would be held out.*learning.held_out"):
        split(numbered(tabled, [f"p{i}" for i in range(10)]), 1e-9)
    with pytest.raises(StoreError, match=r"of 10 prompts 10 would be held out"):
        split(numbered(tabled, [f"p{i}" for i in range(10)]), 1 - 1e-9)
