"""The controller on simulated requests: first arm, shadow drafts, changes of arm, corrections."""

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
    """A plain round takes 1 s, a drafted token of `a` and `b` 0.1 s, one of `free` almost nothing."""

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
    """The rounds of one request, with a fixed acceptance of each drafter."""

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
        self.shadowed: list[str] = []
        self.factor = 1.0

    def round(self, rows: int = 1) -> str:
        arms = {arm.name: arm for arm in ARMS}
        shadow_drafters = self.controller.shadow_drafters(self.ticket)
        self.shadowed += shadow_drafters
        outcomes = []
        for name in shadow_drafters:
            right = self.accepts.get(name, 0)
            outcomes.append(DraftOutcome.of(name, LENGTHS[name], LENGTHS[name], right, right + 1))
        arm = arms[self.arm]
        right = min(self.accepts.get(arm.drafter, 0), arm.num_draft_tokens)
        k = arm.num_draft_tokens
        if k:
            outcomes.append(DraftOutcome.of(arm.drafter, k, k, right, right + 1))
        self.left -= right + 1
        seen = RoundReport(
            self.arm, RoundStats(k, right), right + 1, self.context, rows, self.left, outcomes,
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


def controller_of(**settings: Any) -> AdaptiveController:
    return AdaptiveController(ARMS, Prices(), **settings)


# --- adaptation -----------------------------------------------------------------------------------


def test_a_prior_that_is_right_is_kept() -> None:
    request = Request(controller_of(adapt=True), {"a": 3}, decided("a", a=0.35, b=0.9)).run()
    assert request.arms == ["a"]


def test_a_wrong_prior_is_left_for_the_next_best_arm() -> None:
    request = Request(controller_of(adapt=True), {"b": 4}, decided("a", a=0.4, b=0.6)).run()
    assert request.arms[0] == "a" and request.arms[-1] == "b"


def test_a_request_ends_plainly_where_no_arm_pays() -> None:
    request = Request(controller_of(adapt=True), {}, decided("a", a=0.4, b=0.8, free=1.1)).run()
    assert request.arms[-1] == NONE


def test_a_shorter_draft_is_taken_where_the_rest_is_wrong() -> None:
    """2 of 4 tokens are right, the other two only cost; the shorter arm was never in use."""
    prior = {"a": 0.40, "a@2": 0.45, "b": 1.0, "free": 1.0}
    request = Request(controller_of(adapt=True), {"a": 2}, decided("a", **prior)).run()
    assert request.arms == ["a", "a@2"]


def test_a_free_drafter_shadows_every_round_and_is_found() -> None:
    request = Request(controller_of(adapt=True), {"free": 8}, decided(NONE)).run()
    assert request.shadowed[0] == "free"
    assert request.arms == [NONE, "free"]


def test_an_expensive_drafter_rarely_shadows() -> None:
    request = Request(controller_of(adapt=True), {}, decided(NONE, b=1.0), tokens=300).run()
    every = 0.4 / 0.01
    assert 1 <= request.shadowed.count("b") <= 300 / every


def test_a_drafter_that_cannot_repay_its_shadow_drafts_makes_none() -> None:
    request = Request(
        controller_of(adapt=True), {"a": 4}, decided("a", a=0.3, b=1.3), tokens=300
    ).run()
    assert "b" not in request.shadowed


def test_no_switch_costs_more_than_it_gains_to_the_end() -> None:
    class Expensive(Prices):
        start = 60.0

    cheap, expensive = (
        AdaptiveController(ARMS, Prices(), adapt=True),
        AdaptiveController(ARMS, Expensive(), adapt=True),
    )
    given = ({}, decided("a", a=0.6, b=0.7))
    assert "b" in Request(cheap, *given).run().arms
    assert "b" not in Request(expensive, *given).run().arms


def test_rows_in_flight_change_the_best_arm() -> None:
    request = Request(controller_of(adapt=True), {"a": 1}, decided("a", a=0.7), tokens=400)
    for _ in range(20):
        request.round(rows=1)
    assert request.arm in ("a", "a@2")
    for _ in range(5):
        request.round(rows=12)
    assert request.arm == NONE


def test_an_arm_that_the_engine_refused_is_excluded() -> None:
    controller = controller_of(adapt=True)
    request = Request(controller, {"a": 4, "b": 4}, decided("a", a=0.4, b=0.5))
    request.arm = NONE  # no memory for it
    wanted = [request.round() for _ in range(10)]
    assert "a" not in wanted
    assert wanted[-1] == "b"


def test_repeated_errors_correct_the_predictions_of_later_requests() -> None:
    """A request then begins with the arm that is best by the corrected prediction."""
    controller = controller_of(adapt=True)
    first = [
        Request(controller, {"b": 4}, decided("a", a=0.4, b=0.6), ticket=i).run().arms[0]
        for i in range(30)
    ]
    assert first[0] == "a"
    assert first[-1] == "b"
    assert Request(controller, {"b": 4}, decided("a", a=0.4, b=0.6)).decision.policy.endswith(
        "adjusted"
    )


def test_accurate_predictions_are_not_corrected() -> None:
    controller = controller_of(adapt=True)
    for i in range(30):
        Request(controller, {"a": 3}, decided("a", **{"a": 0.35, "a@2": 0.4}), ticket=i).run()
    assert np.abs(controller._correction).max() == 0.0


def test_a_decision_for_an_unknown_arm_is_unchanged() -> None:
    controller = controller_of(adapt=True, guard=Guard())
    decision = Decision("elsewhere")
    assert controller.begin(0, context_of(), decision, 50) is decision
    assert controller.shadow_drafters(0) == ()
    controller.end(0)


# --- the guard ------------------------------------------------------------------------------------


def test_a_request_continues_plainly_where_its_arm_does_not_pay() -> None:
    request = Request(controller_of(guard=Guard()), {}, decided("a", a=0.4)).run()
    arms = [arm for arm in request.arms if arm != NONE]
    assert arms[0] == "a"
    assert request.arms[-1] == NONE
    # rounds with the arm: 0.4 lost in each
    assert request.context == 120


def test_suspended_arms_are_replaced_by_the_next_best_and_at_last_by_none() -> None:
    controller = controller_of(guard=Guard())
    prior = {"a": 0.4, "a@2": 1.1, "b": 0.5, "free": 1.2}
    begun = [
        Request(controller, {}, decided("a", **prior), ticket=i).run().decision.arm
        for i in range(14)
    ]
    assert begun[0] == "a"
    assert "b" in begun
    assert begun[-1] == NONE
    assert len([line for line in controller.report() if "suspended" in line]) == 2


def test_a_slower_machine_suspends_no_arm() -> None:
    """Every round takes 1.5 times its price, also plain rounds."""
    controller = controller_of(guard=Guard())
    for i in range(12):
        request = Request(controller, {"a": 1}, decided("a", a=0.7), ticket=i)
        request.factor = 1.5
        request.run()
        assert request.decision.arm == "a"
        assert request.arms[-1] == "a"


def test_on_a_faster_machine_an_always_wrong_drafter_does_not_seem_to_gain() -> None:
    """Plain rounds were clocked on the slower machine, so every later round reads as less than one."""
    controller = controller_of(guard=Guard())
    Request(controller, {}, decided(NONE), tokens=50).run()
    arms = []
    for ticket in range(1, 12):
        request = Request(controller, {}, decided("free"), tokens=60, ticket=ticket)
        request.factor = 0.6
        arms.append(request.run().arms[0])
    assert arms[0] == "free" and arms[-1] == NONE


def test_the_clock_gets_plain_rounds_and_then_the_arm_returns() -> None:
    controller = controller_of(guard=Guard())
    request = Request(controller, {"a": 3}, decided("a", a=0.4), tokens=400).run()
    assert request.arms[:3] == ["a", NONE, "a"]
    assert controller.guard is not None
    assert not controller.guard.clock.is_due
    later = Request(controller, {"a": 3}, decided("a", a=0.4), tokens=200, ticket=1).run()
    assert later.arms == ["a"]


# --- exploration ----------------------------------------------------------------------------------


def test_exploration_is_uniform_and_records_its_propensity() -> None:
    controller = controller_of(explore=0.4)
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


def test_exploration_depends_only_on_the_request() -> None:
    one, other = controller_of(explore=1.0), controller_of(explore=1.0)
    for i in range(20):
        context = context_of(id=str(i))
        assert (
            one.begin(i, context, decided("a"), 9).arm
            == other.begin(5, context, decided("a"), 9).arm
        )


def test_without_options_the_decision_is_the_policys() -> None:
    controller = controller_of()
    decision = decided("a", a=0.9, b=0.1)
    assert controller.begin(0, context_of(), decision, 50) is decision
    request = Request(controller, {}, replace(decision)).run()
    assert request.arms == ["a"]
    assert not request.shadowed
