"""Simulated streams: fixed arms take the replay's seconds, and methods that learn find the best arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.contracts import NONE, Decision
from paceline.learning.streams import (
    EXP3,
    UCB,
    Controlled,
    Fixed,
    Offline,
    Stream,
    StreamOutcome,
    StreamPrompt,
)
from paceline.replay import walk
from paceline.selection import AdaptiveController, Arm, Guard

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTHS = {"even": 3, "odd": 3, "useless": 5}
ARMS = [
    Arm(NONE, NONE, 0),
    *(Arm(name, name, k) for name, k in LENGTHS.items()),
    Arm("even@1", "even", 1),
]
NAMES = [NONE, *LENGTHS]
T = 61


class Prices:
    bucket = 64

    def rounds(self, drafter: str, context: int, rows: int) -> np.ndarray:
        return 1.0 + 0.05 * np.arange(LENGTHS.get(drafter, 0) + 1)

    def drafting(self, drafter: str, drafted: int, context: int) -> float:
        return 0.05 * drafted

    def catching_up(self, drafter: str, num_tokens: int) -> float:
        return 0.0 if drafter == NONE else 0.3


def constant(drafter: str, accepted: int) -> np.ndarray:
    """Return [T-1, 2] of a drafter that gets the same number accepted everywhere but at the end."""
    rest = np.arange(T - 1, 0, -1)
    drafted = np.minimum(LENGTHS[drafter], rest - 1)
    return np.stack([drafted, np.minimum(accepted, rest)], axis=1)


def prompt_of(domain: str, decision: Decision | None = None) -> StreamPrompt:
    """`even` is right on even prompts, `odd` on odd ones."""
    ahead = {
        "even": constant("even", 3 if domain == "even" else 0),
        "odd": constant("odd", 3 if domain == "odd" else 0),
        "useless": constant("useless", 0),
    }
    return StreamPrompt(domain, 20, T, ahead, decision or Decision(NONE))


def informed(domain: str, believed: str | None = None) -> StreamPrompt:
    """Build prompts whose policy predicts the truth, or the truth of another domain."""
    right = believed or domain
    seconds = {NONE: 1.0, "even": 1.2, "odd": 1.2, "useless": 1.25, "even@1": 1.1}
    seconds[right] = 0.3
    if right == "even":
        seconds["even@1"] = 0.55
    return prompt_of(domain, Decision(right, seconds_per_token=seconds))


def speed(outcomes: Sequence[StreamOutcome]) -> float:
    return sum(one.plain_seconds for one in outcomes) / sum(one.seconds for one in outcomes)


def play(prompts: Sequence[StreamPrompt], way: object) -> list[StreamOutcome]:
    return Stream(prompts, ARMS, Prices()).play(way)  # type: ignore[arg-type]


@pytest.mark.parametrize(("arm", "k"), [("even", 3), ("even@1", 1), ("useless", 5)])
def test_a_fixed_arm_takes_what_its_replayed_rounds_cost(arm: str, k: int) -> None:
    prompt = prompt_of("even")
    drafter = arm.partition("@")[0]
    [outcomes] = play([prompt], Fixed(arm))

    rounds = walk(prompt.ahead[drafter], k)
    assert outcomes.seconds == pytest.approx(0.3 + (1.0 + 0.05 * rounds[:, 0]).sum())
    assert outcomes.rounds == {arm: len(rounds)}
    assert outcomes.plain_seconds == pytest.approx(T - 1)


def test_none_takes_a_round_a_token_and_starts_nothing() -> None:
    [outcomes] = play([prompt_of("even")], Fixed(NONE))
    assert outcomes.seconds == outcomes.plain_seconds == pytest.approx(T - 1)


def test_the_policys_choice_is_kept() -> None:
    outcomes = play([informed("even"), informed("odd")], Offline())
    assert [list(one.rounds) for one in outcomes] == [["even"], ["odd"]]
    assert speed(outcomes) > 3


@pytest.mark.parametrize("kind", [UCB, EXP3])
def test_bandits_find_the_best_arm_of_a_steady_stream(kind: type[UCB] | type[EXP3]) -> None:
    way = kind("bandit", NAMES, Prices(), seed=0, forgets=False)
    outcomes = play([prompt_of("even")] * 120, way)

    late = outcomes[-30:]
    share = sum(one.rounds.get("even", 0) for one in late) / sum(
        sum(one.rounds.values()) for one in late
    )
    assert share > (0.9 if kind is UCB else 0.5)
    assert speed(late) > speed(outcomes[:10])


def test_a_bandit_that_forgets_pays_for_every_request_anew() -> None:
    prompts = [prompt_of("even")] * 60
    keeping = play(prompts, UCB("keeps", NAMES, Prices(), 0, forgets=False))
    forgetting = play(prompts, UCB("forgets", NAMES, Prices(), 0, forgets=True))

    assert speed(keeping) > speed(forgetting)
    assert all(len(one.rounds) == len(NAMES) for one in forgetting)


def test_a_watch_without_a_policy_finds_each_requests_drafter() -> None:
    """Shadow drafts during plain decoding tell the best arm; two kinds of prompts alternate."""

    class Cheap(Prices):
        def drafting(self, drafter: str, drafted: int, context: int) -> float:
            return 0.0005 * drafted

    prompts = [prompt_of("even" if i % 2 else "odd") for i in range(20)]
    controller = AdaptiveController(ARMS, Cheap(), adapt=True)
    outcomes = Stream(prompts, ARMS, Cheap()).play(
        Controlled("hedge", controller, with_policy=False)
    )

    for prompt, one in zip(prompts, outcomes, strict=True):
        assert max(one.rounds, key=one.rounds.__getitem__).startswith(prompt.domain)
    assert speed(outcomes) > 1.8


def test_a_policy_makes_it_sooner_and_a_wrong_one_is_mended() -> None:
    prompts = [informed("even" if i % 2 else "odd") for i in range(20)]
    wrong = [informed(p.domain, "odd" if p.domain == "even" else "even") for p in prompts]
    hedge = speed(
        play(prompts, Controlled("a", AdaptiveController(ARMS, Prices(), adapt=True), False))
    )
    both = speed(play(prompts, Controlled("b", AdaptiveController(ARMS, Prices(), adapt=True))))
    offline = speed(play(prompts, Offline()))
    misled, mended = (
        speed(play(wrong, Offline())),
        speed(play(wrong, Controlled("c", AdaptiveController(ARMS, Prices(), adapt=True)))),
    )

    assert both > hedge
    assert both > 0.97 * offline
    assert misled < 0.9
    assert mended > 1.1


def test_after_a_shift_the_controller_recovers_within_requests() -> None:
    """The policy predicts every prompt as if it were even."""
    prompts = [informed("even")] * 30 + [informed("odd", "even")] * 60
    controller = AdaptiveController(ARMS, Prices(), adapt=True, guard=Guard())
    outcomes = play(prompts, Controlled("controller", controller))
    offline = play(prompts, Offline())

    assert speed(offline[30:]) < 0.9
    assert speed(outcomes[:30]) > 0.9 * speed(offline[:30])
    assert speed(outcomes[-20:]) > 1.5


def test_the_guard_keeps_its_promise_among_useless_drafters_only() -> None:
    """The policy predicts gains of an always-wrong drafter; the clock errs by 10% per round."""
    seconds = {NONE: 1.0, "even": 0.5, "odd": 0.6, "useless": 0.4, "even@1": 0.7}
    prompts = [
        prompt_of("neither", Decision("useless", seconds_per_token=seconds)) for _ in range(400)
    ]
    stream = Stream(prompts, ARMS, Prices(), noise=0.1)

    assert speed(stream.play(Offline())) < 0.85
    for adapt in (False, True):
        guarded = stream.play(
            Controlled("guard", AdaptiveController(ARMS, Prices(), adapt=adapt, guard=Guard()))
        )
        assert speed(guarded) > 0.98


def test_the_same_seed_gives_the_same_stream() -> None:
    prompts = [informed("even")] * 5
    one = Stream(prompts, ARMS, Prices(), noise=0.3, seed=4).play(Offline())
    two = Stream(prompts, ARMS, Prices(), noise=0.3, seed=4).play(Offline())
    other = Stream(prompts, ARMS, Prices(), noise=0.3, seed=5).play(Offline())
    assert [o.seconds for o in one] == [o.seconds for o in two]
    assert [o.seconds for o in one] != [o.seconds for o in other]
