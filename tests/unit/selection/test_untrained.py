"""The choice without a policy, on simulated rounds: the clock's prices, requests that lose, probes."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.contracts import NONE, Context, RoundReport, RoundStats, SamplingParams
from paceline.selection import UntrainedController
from paceline.selection.guard import FIRST_PAUSE

PLAIN = 0.010  # seconds of a plain round


def context_of(num_prompt: int = 20) -> Context:
    nothing = np.zeros(1, dtype=np.float32)
    return Context(range(num_prompt), nothing, nothing, SamplingParams(), 1)


class Request:
    """A request whose lookup drafts 4 tokens per round: `price` plain rounds, `right` tokens right."""

    def __init__(
        self,
        controller: UntrainedController,
        right: int,
        price: float,
        ticket: int = 0,
        drafted: int = 4,
        context: int = 128,
    ) -> None:
        self.controller, self.ticket = controller, ticket
        self.right, self.price, self.drafted = right, price, drafted
        self.context = context
        self.draft = 0.0  # plain rounds that drafting takes
        decision = controller.choose(context_of(context))
        self.decision = controller.begin(ticket, context_of(context), decision, 400)
        self.arms = [self.decision.arm]
        self.emitted = 0

    def report(self, rows: int = 1, num_drafted: int | None = None, plain: float = PLAIN) -> None:
        arm = self.arms[-1]
        drafted = 0 if arm == NONE else self.drafted
        right = 0 if arm == NONE else self.right
        everyone = drafted if num_drafted is None else num_drafted
        seconds = plain * (self.price if everyone else 1.0)
        seen = RoundReport(
            arm, RoundStats(drafted, right), right + 1, self.context, rows, 400, [],
            start_seconds=0.0, draft_seconds=self.draft * PLAIN * (arm != NONE),
            other_seconds=seconds, num_drafted=everyone,
        )  # fmt: skip
        self.emitted += right + 1
        self.context += right + 1
        if self.controller.observes_round(self.ticket):
            wanted = self.controller.after_round(self.ticket, seen)
            assert wanted != arm
            self.arms.append(wanted or arm)
        else:
            self.arms.append(arm)

    def run(self, rounds: int) -> Request:
        for _ in range(rounds):
            self.report()
        self.controller.end(self.ticket, self.emitted)
        return self


def test_a_lookup_that_pays_is_kept_after_the_first_plain_rounds() -> None:
    request = Request(UntrainedController("lookup"), right=3, price=1.5).run(60)
    first, rest = request.arms[:12], request.arms[12:]
    assert first[0] == "lookup" and NONE in first
    assert set(rest) == {"lookup"}
    assert request.decision.policy == "untrained"


def test_a_lookup_that_is_never_right_is_left() -> None:
    request = Request(UntrainedController("lookup"), right=0, price=1.5).run(60)
    used = [i for i, arm in enumerate(request.arms) if arm == "lookup"]
    # one round before the price is known, and 10 plain rounds of losses at 0.5 each
    assert 15 < len(used) <= 22 and used[-1] < 40


def test_rounds_that_emit_too_little_for_their_seconds_lose_although_drafts_are_accepted() -> None:
    kept = Request(UntrainedController("lookup"), right=1, price=1.5).run(60)
    left = Request(UntrainedController("lookup"), right=1, price=2.6).run(60)
    assert kept.arms[-1] == "lookup" and left.arms[-1] == NONE


def test_a_lookup_without_matches_costs_nothing_and_stays() -> None:
    request = Request(UntrainedController("lookup"), right=0, price=1.0, drafted=0).run(300)
    assert request.arms[-1] == "lookup"
    assert NONE not in request.arms[20:]  # rounds without drafts are plain rounds to the clock


def test_a_slow_round_without_a_draft_is_not_the_lookups_loss() -> None:
    request = Request(UntrainedController("lookup"), right=0, price=1.0, drafted=0)
    for i in range(200):
        request.report(plain=PLAIN * (3 if i % 3 == 2 else 1))
    assert request.arms[-1] == "lookup"


def test_a_round_takes_at_least_its_draft_and_a_plain_round() -> None:
    """The machine is faster than when plain rounds were clocked; wrong drafts must not seem to gain."""
    request = Request(UntrainedController("lookup"), right=0, price=0.5)
    request.draft = 0.2
    assert request.run(60).arms[-1] == NONE


def test_plain_rounds_are_clocked_again_after_many_drafted_ones() -> None:
    request = Request(UntrainedController("lookup"), right=3, price=1.5, context=1 << 14)
    request.run(600)
    again = [i for i, arm in enumerate(request.arms) if arm == NONE and i > 20]
    assert len(again) in (2, 3) and np.diff(again).min() > 200


def test_an_interrupted_plain_round_does_not_hide_a_loss() -> None:
    controller = UntrainedController("lookup")
    request = Request(controller, right=0, price=1.5)
    for i in range(60):
        request.report(plain=PLAIN * (50 if i in (2, 3) else 1))
    assert request.arms[-1] == NONE


def test_a_lookup_that_loses_request_after_request_is_suspended_and_probed() -> None:
    controller = UntrainedController("lookup")
    arms = [Request(controller, 0, 1.5, i).run(40).decision.arm for i in range(3 + FIRST_PAUSE)]
    assert arms[:3] == ["lookup"] * 3 and set(arms[3:-1]) == {NONE}
    assert "suspended" in controller.report()[0]
    assert controller.begin(99, context_of(), controller.choose(context_of()), 400).arm == "lookup"


def test_a_probe_that_gains_brings_the_lookup_back() -> None:
    controller = UntrainedController("lookup")
    arms = []
    for i in range(80):
        right = 0 if i < 5 else 3
        arms.append(Request(controller, right, 1.5, i).run(60).decision.arm)
    assert NONE in arms[:10] and set(arms[-20:]) == {"lookup"}


def test_rows_of_a_batch_are_clocked_in_rounds_that_are_plain_for_all() -> None:
    controller = UntrainedController("lookup")
    rows = [Request(controller, 3, 1.5, ticket, context=20 * ticket + 128) for ticket in range(3)]
    for _ in range(40):
        everyone = sum(row.drafted for row in rows if row.arms[-1] != NONE)
        for row in rows:
            row.report(rows=3, num_drafted=everyone)
    assert all(row.arms[-1] == "lookup" for row in rows)
    plain = [[arm == NONE for arm in row.arms] for row in rows]
    # the price is known in the middle of a round, so some rows resume one round earlier
    differing = [len(set(arms)) > 1 for arms in zip(*plain, strict=True)]
    assert 0 < sum(plain[0]) < 10 and sum(differing) <= 1


def test_a_batch_whose_drafts_are_wrong_decodes_plainly() -> None:
    controller = UntrainedController("lookup")
    rows = [Request(controller, 0, 1.5, ticket) for ticket in range(3)]
    for _ in range(60):
        everyone = sum(row.drafted for row in rows if row.arms[-1] != NONE)
        for row in rows:
            row.report(rows=3, num_drafted=everyone)
    assert [row.arms[-1] for row in rows] == [NONE] * 3


@pytest.mark.parametrize("other", [(1, 5000), (4, 20)])
def test_another_load_or_context_is_clocked_on_its_own(other: tuple[int, int]) -> None:
    """A plain round there takes three times as long, so a drafted round seems to lose, and does not."""
    controller = UntrainedController("lookup")
    Request(controller, 3, 1.5).run(60)
    rows, context = other
    request = Request(controller, 3, 1.5, ticket=1, context=context)
    for _ in range(40):
        request.report(rows=rows, plain=20 * PLAIN)
    assert request.arms[-1] == "lookup" and NONE in request.arms


def test_a_row_that_cannot_have_the_lookup_is_not_watched() -> None:
    controller = UntrainedController("lookup")
    request = Request(controller, 0, 1.0)
    request.arms[-1] = NONE  # the engine's choice
    request.report()
    assert not controller.observes_round(0)
    assert not controller.shadow_drafters(0)
    assert controller.after_round(7, None) is None  # type: ignore[arg-type]
    controller.end(7)
