"""The controller: what it begins with, scores, goes on with and learns; played through on paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paceline.contracts import (
    NONE,
    Context,
    Decision,
    DraftOutcome,
    RoundReport,
    RoundStats,
    SamplingParams,
)
from paceline.selection import AdaptiveController, Arm, Guard

LENGTHS = {"a": 4, "b": 4, "free": 8}
ARMS = [
    Arm(NONE, NONE, 0),
    *(Arm(name, name, k) for name, k in LENGTHS.items()),
    Arm("a@2", "a", 2),
]
DRAFT = {"a": 0.1, "b": 0.1, "free": 0.0005, NONE: 0.0}


class Prices:
    """A plain round takes a second; a drafted token of `a` and `b` a tenth, `free` next to nothing."""

    bucket = 64
    start = 1.0

    def rounds(self, drafter: str, context: int, rows: int) -> np.ndarray:
        return 1.0 + DRAFT[drafter] * rows * np.arange(LENGTHS.get(drafter, 0) + 1)

    def drafting(self, drafter: str, drafted: int, context: int) -> float:
        return DRAFT[drafter] * drafted

    def catching_up(self, drafter: str, num_tokens: int) -> float:
        return 0.0 if drafter == "free" or num_tokens <= 8 else self.start


def context_of(rows: int = 1, id: str = "") -> Context:
    nothing = np.zeros(1, dtype=np.float32)
    return Context(range(20), nothing, nothing, SamplingParams(), rows, id)


def decided(arm: str, **prior: float) -> Decision:
    seconds = {name: prior.get(name, 1.0) for name in [NONE, *LENGTHS, "a@2"]}
    return Decision(arm, seconds_per_token=seconds if prior else {})


class Request:
    """Rounds of one request: what each drafter would have accepted at every place is fixed."""

    def __init__(
        self,
        controller: AdaptiveController,
        accepts: dict[str, int],
        decision: Decision,
        tokens: int = 100,
        ticket: int = 0,
    ) -> None:
        self.controller, self.accepts, self.ticket = controller, accepts, ticket
        self.left = tokens
        self.context = 20
        self.decision = controller.begin(ticket, context_of(), decision, tokens)
        self.arm = self.decision.arm
        self.arms = [self.arm]
        self.outcomes: list[str] = []
        self.factor = 1.0

    def round(self, rows: int = 1) -> str:
        arms = {arm.name: arm for arm in ARMS}
        beside = self.controller.shadow_drafters(self.ticket)
        self.outcomes += beside
        told = []
        for name in beside:
            right = self.accepts.get(name, 0)
            told.append(DraftOutcome.of(name, LENGTHS[name], LENGTHS[name], right, right + 1))
        arm = arms[self.arm]
        right = min(self.accepts.get(arm.drafter, 0), arm.num_draft_tokens)
        k = arm.num_draft_tokens
        if k:
            told.append(DraftOutcome.of(arm.drafter, k, k, right, right + 1))
        self.left -= right + 1
        seen = RoundReport(
            self.arm, RoundStats(k, right), right + 1, self.context, rows, self.left, told,
            0.0, DRAFT[arm.drafter] * k * self.factor, 1.0 * self.factor,
        )  # fmt: skip
        self.context += right + 1
        wanted = self.controller.after_round(self.ticket, seen)
        if wanted is not None:
            assert wanted != self.arm
            self.arm = wanted
            self.arms.append(wanted)
        return self.arm

    def run(self) -> Request:
        while self.left > 0:
            self.round()
        self.controller.end(self.ticket)
        return self


def watch_of(**settings: Any) -> AdaptiveController:
    return AdaptiveController(ARMS, Prices(), **settings)


# --- adaptation -----------------------------------------------------------------------------------


def test_a_prior_that_is_right_is_kept() -> None:
    request = Request(watch_of(adapt=True), {"a": 3}, decided("a", a=0.35, b=0.9)).run()
    assert request.arms == ["a"]


def test_a_wrong_prior_gives_way_to_the_next_best() -> None:
    request = Request(watch_of(adapt=True), {"b": 4}, decided("a", a=0.4, b=0.6)).run()
    assert request.arms[0] == "a" and request.arms[-1] == "b"


def test_where_nothing_pays_the_rest_is_plain() -> None:
    request = Request(watch_of(adapt=True), {}, decided("a", a=0.4, b=0.8, free=1.1)).run()
    assert request.arms[-1] == NONE


def test_a_shorter_draft_is_taken_where_the_rest_is_wrong() -> None:
    """Two of four right: the other two only cost. Nobody ever tried the shorter arm."""
    prior = {"a": 0.40, "a@2": 0.45, "b": 1.0, "free": 1.0}
    request = Request(watch_of(adapt=True), {"a": 2}, decided("a", **prior)).run()
    assert request.arms == ["a", "a@2"]


def test_a_free_drafter_is_scored_every_round_and_found() -> None:
    request = Request(watch_of(adapt=True), {"free": 8}, decided(NONE)).run()
    assert request.outcomes[0] == "free"
    assert request.arms == [NONE, "free"]


def test_a_dear_drafter_is_scored_seldom() -> None:
    request = Request(watch_of(adapt=True), {}, decided(NONE, b=1.0), tokens=300).run()
    every = 0.4 / 0.01
    assert 1 <= request.outcomes.count("b") <= 300 / every


def test_a_drafter_that_cannot_be_worth_its_price_is_not_scored() -> None:
    request = Request(watch_of(adapt=True), {"a": 4}, decided("a", a=0.3, b=1.3), tokens=300).run()
    assert "b" not in request.outcomes


def test_no_switch_that_the_rest_of_the_request_does_not_pay_for() -> None:
    class Dear(Prices):
        start = 60.0

    cheap, dear = (
        AdaptiveController(ARMS, Prices(), adapt=True),
        AdaptiveController(ARMS, Dear(), adapt=True),
    )
    given = ({}, decided("a", a=0.6, b=0.7))
    assert "b" in Request(cheap, *given).run().arms
    assert "b" not in Request(dear, *given).run().arms


def test_rows_in_flight_change_what_is_best() -> None:
    request = Request(watch_of(adapt=True), {"a": 1}, decided("a", a=0.7), tokens=400)
    for _ in range(20):
        request.round(rows=1)
    assert request.arm in ("a", "a@2")
    for _ in range(5):
        request.round(rows=12)
    assert request.arm == NONE


def test_an_arm_the_engine_could_not_give_is_not_asked_for_again() -> None:
    controller = watch_of(adapt=True)
    request = Request(controller, {"a": 4, "b": 4}, decided("a", a=0.4, b=0.5))
    request.arm = NONE  # no memory for it
    wanted = [request.round() for _ in range(10)]
    assert "a" not in wanted
    assert wanted[-1] == "b"


def test_predictions_that_keep_failing_are_corrected_for_the_requests_after() -> None:
    """And an arm that the corrected prediction puts first is begun with."""
    controller = watch_of(adapt=True)
    first = [
        Request(controller, {"b": 4}, decided("a", a=0.4, b=0.6), ticket=i).run().arms[0]
        for i in range(30)
    ]
    assert first[0] == "a"
    assert first[-1] == "b"
    assert Request(controller, {"b": 4}, decided("a", a=0.4, b=0.6)).decision.policy.endswith(
        "adjusted"
    )


def test_predictions_that_hold_are_left_alone() -> None:
    controller = watch_of(adapt=True)
    for i in range(30):
        Request(controller, {"a": 3}, decided("a", **{"a": 0.35, "a@2": 0.4}), ticket=i).run()
    assert np.abs(controller._correction).max() == 0.0


def test_an_unknown_arm_is_left_to_whoever_chose_it() -> None:
    controller = watch_of(adapt=True, guard=Guard())
    decision = Decision("elsewhere")
    assert controller.begin(0, context_of(), decision, 50) is decision
    assert controller.shadow_drafters(0) == ()
    controller.end(0)


# --- the guard ------------------------------------------------------------------------------------


def test_a_request_goes_on_plainly_where_its_arm_does_not_pay() -> None:
    request = Request(watch_of(guard=Guard()), {}, decided("a", a=0.4)).run()
    arms = [arm for arm in request.arms if arm != NONE]
    assert arms[0] == "a"
    assert request.arms[-1] == NONE
    # rounds with the arm: 0.4 lost in each
    assert request.context == 120


def test_a_benched_arm_makes_room_for_the_next_best_and_in_the_end_for_none() -> None:
    controller = watch_of(guard=Guard())
    prior = {"a": 0.4, "a@2": 1.1, "b": 0.5, "free": 1.2}
    begun = [
        Request(controller, {}, decided("a", **prior), ticket=i).run().decision.arm
        for i in range(14)
    ]
    assert begun[0] == "a"
    assert "b" in begun
    assert begun[-1] == NONE
    assert len([line for line in controller.report() if "suspended" in line]) == 2


def test_a_machine_that_became_slower_benches_nobody() -> None:
    """Everything takes 1.5 times its price, plain rounds too."""
    controller = watch_of(guard=Guard())
    for i in range(12):
        request = Request(controller, {"a": 1}, decided("a", a=0.7), ticket=i)
        request.factor = 1.5
        request.run()
        assert request.decision.arm == "a"
        assert request.arms[-1] == "a"


def test_a_machine_that_became_faster_makes_no_wrong_drafter_seem_to_gain() -> None:
    """Plain rounds were clocked in slower times, so every round since reads as less than a plain one."""
    controller = watch_of(guard=Guard())
    Request(controller, {}, decided(NONE), tokens=50).run()
    arms = []
    for ticket in range(1, 12):
        request = Request(controller, {}, decided("free"), tokens=60, ticket=ticket)
        request.factor = 0.6
        arms.append(request.run().arms[0])
    assert arms[0] == "free" and arms[-1] == NONE


def test_the_clock_gets_plain_rounds_and_the_arm_comes_back() -> None:
    controller = watch_of(guard=Guard())
    request = Request(controller, {"a": 3}, decided("a", a=0.4), tokens=400).run()
    assert request.arms[:3] == ["a", NONE, "a"]
    assert controller.guard is not None
    assert not controller.guard.clock.is_due
    later = Request(controller, {"a": 3}, decided("a", a=0.4), tokens=200, ticket=1).run()
    assert later.arms == ["a"]


# --- exploration ----------------------------------------------------------------------------------


def test_exploration_draws_evenly_and_says_how_likely_it_was() -> None:
    controller = watch_of(explore=0.4)
    counts: dict[str, int] = {}
    total = 4000
    for i in range(total):
        decision = controller.begin(i, context_of(id=str(i)), decided("b"), 50)
        controller.end(i)
        counts[decision.arm] = counts.get(decision.arm, 0) + 1
        assert decision.propensity == pytest.approx(0.68 if decision.arm == "b" else 0.08)
    for arm, count in counts.items():
        share = 0.68 if arm == "b" else 0.08
        assert abs(count / total - share) < 4 * (share * (1 - share) / total) ** 0.5
    assert len(counts) == 5


def test_exploration_repeats_itself_for_the_same_request() -> None:
    one, other = watch_of(explore=1.0), watch_of(explore=1.0)
    for i in range(20):
        context = context_of(id=str(i))
        assert (
            one.begin(i, context, decided("a"), 9).arm
            == other.begin(5, context, decided("a"), 9).arm
        )


def test_without_anything_the_decision_is_the_policys() -> None:
    controller = watch_of()
    decision = decided("a", a=0.9, b=0.1)
    assert controller.begin(0, context_of(), decision, 50) is decision
    request = Request(controller, {}, replace(decision)).run()
    assert request.arms == ["a"]
    assert not request.outcomes
