"""Round tables equal the reference of one prompt and arm at a time, to the last bit of a price."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.costs import CostTable, Measurement
from paceline.errors import StoreError
from paceline.learning.rounds import round_table
from paceline.replay import rounds_of
from paceline.rewards import request_seconds
from paceline.store.records import CollectedPrompt, ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Callable

ARMS = ("none", "code@1", "code@3", "code", "tree")


def prompts(num: int = 30) -> list[CollectedPrompt]:
    """Draw replays: `code` everywhere, `tree` round by round; some answers have one token."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(num):
        T = 1 if i % 10 == 9 else int(rng.integers(2, 40))
        left = T - np.arange(1, T)
        drafted = rng.integers(0, 6, T - 1)
        accepted = np.minimum(rng.integers(0, drafted + 1), left)
        rounds, place = [], 1
        while place < T:
            kept = int(min(rng.integers(0, 5), T - place))
            rounds.append((5, kept))
            place += kept + 1
        replays = {
            "code": ReplayedDrafter(np.stack([drafted, accepted], axis=1), everywhere=True),
            "tree": ReplayedDrafter(np.array(rounds).reshape(-1, 2), everywhere=False),
        }
        tokens = tuple(range(int(rng.integers(3, 50))))
        found.append(
            CollectedPrompt(
                f"p{i}", "", tokens, tuple(range(T)), 40, np.zeros(2, np.float32), replays, {}
            )
        )
    return found


def costs() -> CostTable:
    """Return seconds that differ for all arguments, batches included."""
    rows = [Measurement("engine", "round", 0, 0, n, 0.1 * n) for n in (1, 8)]
    for n in (1, 8):
        for context in (0, 30, 90):
            rows += [
                Measurement("target", "forward", t, context, n, 1 + 0.07 * t * n + 0.003 * context)
                for t in (1, 4, 40)
            ]
    for length in (1, 60):
        rows.append(Measurement("target", "prefill", length, 0, 1, 2.0 + 0.1 * length))
        rows += [
            Measurement(d, "start", length, 0, 1, 0.2 + 0.01 * length) for d in ("code", "tree")
        ]
    for t in (0, 2, 6):
        rows += [Measurement(d, "propose", t, 20, 1, 0.05 + 0.2 * t) for d in ("code", "tree")]
    return CostTable({}, rows)


@pytest.mark.parametrize(("rows", "objective"), [(1, 0.0), (4, 0.0), (8, 1.0), (4, 0.3)])
def test_prices_are_those_of_one_request_at_a_time(rows: int, objective: float) -> None:
    table = costs()
    found = round_table(prompts(), ARMS).seconds(table.seconds, rows, objective)

    for i, prompt in enumerate(prompts()):
        for j, arm in enumerate(ARMS):
            rounds = rounds_of(prompt, arm)
            num_prompt = len(prompt.prompt_tokens)
            expected = request_seconds(table.seconds, arm, num_prompt, rounds, rows, objective)
            assert found[i, j] == pytest.approx(expected, rel=1e-12), (prompt.id, arm)


def test_counts_are_those_of_the_rounds() -> None:
    found = round_table(prompts(), ARMS)

    for i, prompt in enumerate(prompts()):
        for j, arm in enumerate(ARMS):
            rounds = rounds_of(prompt, arm)
            assert found.num_rounds()[i, j] == len(rounds)
            assert found.num_drafted()[i, j] == rounds[:, 0].sum()


def test_any_choice_of_prompts_keeps_their_rounds() -> None:
    whole = round_table(prompts(), ARMS)
    chosen = np.array([9, 3, 3, 28])

    part = whole.rows(chosen)

    table = costs()
    assert part.num_rounds().tolist() == whole.num_rounds()[chosen].tolist()
    assert part.seconds(table.seconds) == pytest.approx(whole.seconds(table.seconds)[chosen])


# --- cascades -------------------------------------------------------------------------------------

COMPOSED = ("none", "both", "code")


def cascade_rounds(i: int, num_output: int, rows: int) -> ReplayedDrafter:
    """Draw the rounds of a cascade on prompt i; other numbers of rows in flight give others."""
    rng = np.random.default_rng(1000 * rows + i)
    rounds, proposed, place = [], [], 1
    while place < num_output:
        drafted = int(rng.integers(0, 6))
        kept = int(min(rng.integers(0, drafted + 1), num_output - place))
        rounds.append((drafted, kept))
        # a model drafts in some rounds, perhaps more tokens than are verified
        proposed.append(int(rng.integers(drafted, 7)) if rng.random() < 0.4 else 0)
        place += kept + 1
    return ReplayedDrafter(
        np.array(rounds, dtype=np.int64).reshape(-1, 2),
        everywhere=False,
        proposed=np.array(proposed, dtype=np.int64),
        under_load=lambda n: cascade_rounds(i, num_output, n),
    )


def with_cascade(num: int = 30) -> list[CollectedPrompt]:
    return [
        replace(p, replays=p.replays | {"both": cascade_rounds(i, len(p.output_tokens), 1)})
        for i, p in enumerate(prompts(num))
    ]


def costs_of_cascades() -> CostTable:
    """Return `costs` with the cascade, whose price depends on the tokens of its models alone."""
    rows = list(costs().measurements)
    rows += [Measurement("both", "start", n, 0, 1, 0.3 + 0.02 * n) for n in (1, 60)]
    for n in (1, 8):
        rows += [Measurement("both", "propose", t, 20, n, n * (0.1 + 0.4 * t)) for t in (0, 2, 6)]
    return CostTable({}, rows)


def expected_seconds(
    prompt: CollectedPrompt, arm: str, rows: int, objective: float, table: CostTable
) -> float:
    """Price one prompt, with the rounds that a cascade has under this load."""
    rounds, proposed = rounds_of(prompt, arm), None
    if arm == "both":
        own = prompt.replays[arm]
        if rows > 1:
            assert own.under_load is not None
            own = own.under_load(rows)
        rounds, proposed = own.table, own.proposed
    num_prompt = len(prompt.prompt_tokens)
    return request_seconds(
        table.seconds, arm, num_prompt, rounds, rows, objective, proposed=proposed
    )


@pytest.mark.parametrize(("rows", "objective"), [(1, 0.0), (4, 0.0), (8, 1.0), (4, 0.3)])
def test_cascades_are_priced_by_their_models_tokens_and_walked_again_under_load(
    rows: int, objective: float
) -> None:
    table, found = costs_of_cascades(), with_cascade()

    seconds = round_table(found, COMPOSED).seconds(table.seconds, rows, objective)

    for i, prompt in enumerate(found):
        for j, arm in enumerate(COMPOSED):
            expected = expected_seconds(prompt, arm, rows, objective, table)
            assert seconds[i, j] == pytest.approx(expected, rel=1e-12), (prompt.id, arm)


def test_calls_and_proposed_tokens_are_those_of_a_cascades_models() -> None:
    found = with_cascade()
    table = round_table(found, COMPOSED)

    assert table.composed == (1,)
    for i, prompt in enumerate(found):
        own, code = prompt.replays["both"].proposed, rounds_of(prompt, "code")[:, 0]
        assert own is not None
        assert table.num_calls()[i].tolist() == [0, (own > 0).sum(), (code > 0).sum()]
        assert table.num_proposed()[i].tolist() == [0, own.sum(), code.sum()]


@pytest.mark.parametrize("rows", [1, 4])
def test_any_choice_of_prompts_keeps_a_cascades_rounds(rows: int) -> None:
    whole, table = round_table(with_cascade(), COMPOSED), costs_of_cascades()
    chosen = np.array([9, 3, 3, 28])

    part = whole.rows(chosen)

    assert part.composed == (1,)
    assert part.num_proposed().tolist() == whole.num_proposed()[chosen].tolist()
    expected = whole.seconds(table.seconds, rows)[chosen]
    assert part.seconds(table.seconds, rows) == pytest.approx(expected)
    assert whole.rows(np.arange(0)).seconds(table.seconds, rows).shape == (0, 3)


def test_an_arm_that_was_not_replayed_is_named(collected: Callable[..., CollectedPrompt]) -> None:
    with pytest.raises(StoreError, match=r"'math' was not replayed on prompt 'p0'"):
        round_table(prompts(2), ("none", "math"))
    with pytest.raises(StoreError, match=r"'tree@2'.*depend on one another"):
        round_table(prompts(2), ("none", "tree@2"))
