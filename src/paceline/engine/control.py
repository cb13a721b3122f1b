"""Rows with a controller, which may change their arm between rounds, and their shadow drafts.

This module is the engine's side of a controller. It asks for the shadow drafts that the controller
names, compares them with the text when that is written, and charges the seconds of all this to the row.
It carries out the controller's choice of arm. A shadow draft is made in addition to the arm in use, and
nobody verifies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

from paceline.contracts import DraftOutcome, RoundReport, split_arm
from paceline.drafting.draft_replay import count_accepted
from paceline.engine.checks import check_arm
from paceline.engine.containment import contained
from paceline.errors import ArtefactError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.contracts import Context, Decision
    from paceline.engine.rows import Row
    from paceline.engine.seats import Seats


_CONTROLLER: Final = "controller"  # the cause that an error names


class ArmController(Protocol):
    """The decisions of a request after the policy's, by ticket.

    No call may depend on tokens that are still to be verified.
    """

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        """Return the decision to carry out instead of the policy's. room: tokens yet to be emitted."""

    def shadow_drafters(self, ticket: int) -> Sequence[str]:
        """Return the drafters that should make a shadow draft in the coming round."""

    def after_round(self, ticket: int, report: RoundReport) -> str | None:
        """Return the arm of the next round, or None to keep the arm in use."""

    def observes_round(self, ticket: int) -> bool:
        """Return whether the coming round should be reported to `after_round`."""

    def end(self, ticket: int, emitted: int) -> None:
        """Forget a request that has ended. emitted: tokens of its rounds."""


@dataclass(slots=True)
class _ShadowDraft:
    """A draft that is compared with the text as it is written."""

    drafter: str
    start: int  # tokens of the row when it was made
    tokens: list[int]
    parents: list[int] | None
    allowed: int
    known: int = 0

    def compare(self, row: Row) -> DraftOutcome:
        """Return the outcome as far as the text is written."""
        written = row.tokens[self.start :]
        right = count_accepted(self.tokens, self.parents, written)
        outcome = DraftOutcome.of(
            self.drafter, len(self.tokens), self.allowed, right, len(written), self.known
        )
        self.known = right
        return outcome


@dataclass(slots=True)
class _RoundStart:
    """The counts and seconds of a row before a round."""

    num_tokens: int
    draft: float  # seconds of drafting so far
    other: float  # seconds of verification and commit so far
    start: float  # seconds of starting its own drafter, since the previous round
    shadow: float  # seconds of shadow drafts, and of starting their drafters


class ControlledRows:
    """The controlled rows of one engine."""

    def __init__(self, controller: ArmController, seats: Seats) -> None:
        self.controller = controller
        self._seats = seats
        self._shadows: dict[int, list[_ShadowDraft]] = {}
        self._reported: dict[int, float] = {}  # draft seconds of each row that were reported

    def begin(self, row: Row, context: Context, decision: Decision) -> Decision:
        """Return the controller's decision for a new row."""
        self._shadows[row.id] = []
        self._reported[row.id] = row.seconds.draft
        return self.controller.begin(row.id, context, decision, row.max_total - len(row.tokens))

    def end(self, row: Row) -> None:
        """End the control of a row, if it is controlled."""
        if self._shadows.pop(row.id, None) is None:
            return
        del self._reported[row.id]
        # a controller may be the user's own code
        with contained(lambda error: row.fail(_CONTROLLER, error)):
            self.controller.end(row.id, max(len(row.tokens) - row.num_prompt - 1, 0))

    def controls(self, row: Row) -> bool:
        """Return whether the row has a controller."""
        return row.id in self._shadows

    # --- a round ----------------------------------------------------------------------------------

    def before_round(self, rows: Sequence[Row]) -> dict[int, _RoundStart]:
        """Make the shadow drafts of a round; return by ticket the state of the rows to report.

        A row whose controller fails here fails alone.
        """
        starts: dict[int, _RoundStart] = {}
        for row in rows:
            if not self.controls(row):
                continue
            with contained(lambda error, row=row: row.fail(_CONTROLLER, error)):  # type: ignore[misc]
                if self.controller.observes_round(row.id):
                    starts[row.id] = self._start_round(row)
        return starts

    def _start_round(self, row: Row) -> _RoundStart:
        began = perf_counter()
        started = row.seconds.draft - self._reported[row.id]
        for name in self.controller.shadow_drafters(row.id):
            self._make_shadow(row, name)
        spent = perf_counter() - began
        row.seconds.draft += spent
        return _RoundStart(
            num_tokens=len(row.tokens),
            draft=row.seconds.draft,
            other=row.seconds.verify + row.seconds.commit,
            start=started,
            shadow=spent,
        )

    def _make_shadow(self, row: Row, name: str) -> None:
        limit = row.limit_at(len(row.tokens), any_length=True)
        shadow = self._seats.propose_shadow(row, name, limit) if limit >= 1 else None
        if shadow is not None:
            draft, allowed = shadow
            self._shadows[row.id].append(
                _ShadowDraft(name, len(row.tokens), draft.tokens, draft.parents, allowed)
            )

    def after_round(self, rows: Sequence[Row], starts: Mapping[int, _RoundStart]) -> None:
        """Report each controlled row's round, and change its arm if the controller chooses another.

        The last round of a row is reported too: its costs count for later requests.
        """
        num_drafted = sum(row.rounds[-1].drafted for row in rows if row.error is None)
        for row in rows:
            start = starts.get(row.id)
            if start is None or row.error is not None:
                continue
            arm = None
            with contained(lambda error, row=row: self._fail(row, error)):  # type: ignore[misc]
                arm = self._report(row, start, len(rows), num_drafted)
                if arm is not None:
                    check_arm(arm, self._seats.drafters, ArtefactError)
            if row.finish_reason is not None or arm is None or arm == row.arm:
                continue
            if self._seats.is_usable(row, split_arm(arm)[0]):
                self._seats.switch(row, arm, keeps_others=True)

    @staticmethod
    def _fail(row: Row, error: BaseException) -> None:
        if row.finish_reason is None:
            row.fail(_CONTROLLER, error)

    def _report(self, row: Row, start: _RoundStart, num_rows: int, num_drafted: int) -> str | None:
        began = perf_counter()
        outcomes = self._compare_shadows(row)
        stats = row.rounds[-1]
        allowed = min(row.limit_at(start.num_tokens), row.num_draft_tokens)
        emitted = len(row.tokens) - start.num_tokens
        if allowed > 0:
            # the target's own token follows the accepted tokens
            outcomes.append(
                DraftOutcome.of(row.drafter_name, stats.drafted, allowed, stats.accepted, emitted)
            )
        report = RoundReport(
            arm=row.arm,
            stats=stats,
            emitted=emitted,
            context=start.num_tokens - 1,
            rows=num_rows,
            room=row.max_total - len(row.tokens),
            outcomes=outcomes,
            start_seconds=start.start,
            shadow_seconds=start.shadow,
            draft_seconds=row.seconds.draft - start.draft,
            other_seconds=row.seconds.verify + row.seconds.commit - start.other,
            num_drafted=num_drafted,
        )
        self._reported[row.id] = row.seconds.draft
        arm = self.controller.after_round(row.id, report)
        row.seconds.choose += perf_counter() - began
        return arm

    def _compare_shadows(self, row: Row) -> list[DraftOutcome]:
        shadows = self._shadows[row.id]
        outcomes = [shadow.compare(row) for shadow in shadows]
        self._shadows[row.id] = [
            shadow
            for shadow, outcome in zip(shadows, outcomes, strict=True)
            if not outcome.is_final
        ]
        return outcomes
