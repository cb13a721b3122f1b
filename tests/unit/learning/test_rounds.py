"""Round tables equal the reference of one prompt and arm at a time, to the last bit of a price."""

from __future__ import annotations

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


def test_an_arm_that_was_not_replayed_is_named(collected: Callable[..., CollectedPrompt]) -> None:
    with pytest.raises(StoreError, match=r"'math' was not replayed on prompt 'p0'"):
        round_table(prompts(2), ("none", "math"))
    with pytest.raises(StoreError, match=r"'tree@2'.*depend on one another"):
        round_table(prompts(2), ("none", "tree@2"))
