"""The choice without a policy: one lookup drafter, and plain decoding where the lookup does not pay.

It needs no cost table. A round in which no row drafts is a plain round, so its seconds are clocked
where they occur, and the guard charges every other round against them. Where too few plain rounds
were clocked, the request decodes plainly for some rounds. Like every controller, it sees finished
rounds only. A *ticket* names a request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Final

from paceline.contracts import NONE, Decision
from paceline.selection.guard import Guard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Context, RoundReport
    from paceline.selection.guard import RequestLosses

UNTRAINED: Final = "untrained"
"""The name of this choice in decision logs."""

_NEEDED: Final = 8  # plain rounds before a price is known
_KEPT: Final = 15  # plain rounds whose median is the price
_EVERY: Final = 200  # drafted rounds after which a plain round is due
_EXPECTED_TOKENS: Final = 64.0  # of an answer
# plain rounds that a request may lose: a lookup finds little in the first tokens of an answer, which are
# new text, and gains later; whether it pays is judged over requests
_ALLOWED_LOSS: Final = 10.0


@dataclass(slots=True)
class _PlainRounds:
    """The clocked plain rounds of one load and range of contexts.

    seconds: the median of the last rounds, which an interrupted round does not change; None before
    enough were clocked.
    """

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    seconds: float | None = None
    num_drafted_since: int = 0

    @property
    def is_due(self) -> bool:
        """True if a plain round is needed to know the price."""
        return self.seconds is None or self.num_drafted_since >= _EVERY

    def add(self, seconds: float) -> None:
        self.recent.append(seconds)
        self.num_drafted_since = 0
        if len(self.recent) >= _NEEDED:
            self.seconds = median(self.recent)


@dataclass(slots=True)
class _LookupRequest:
    losses: RequestLosses
    arm: str  # of the coming round
    is_stopped: bool  # plain to its end
    emitted: int = 0


class UntrainedController:
    """Both the policy and the controller of requests with drafter `auto`, without any training.

    lookup: the name of the drafter.
    """

    def __init__(self, lookup: str, guard: Guard | None = None) -> None:
        self.lookup = lookup
        self.guard = guard or Guard(_ALLOWED_LOSS)
        self._plain: dict[tuple[int, int], _PlainRounds] = {}
        self._requests: dict[int, _LookupRequest] = {}

    def choose(self, context: Context) -> Decision:
        """Return the lookup for any request."""
        return Decision(self.lookup, policy=UNTRAINED)

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        """Return the decision, or `none` where the guard does not admit the lookup."""
        if not self.guard.admits(decision.arm):
            decision = replace(decision, arm=NONE, policy=f"{decision.policy}, adjusted")
        losses = self.guard.begin(decision.arm, min(float(room), _EXPECTED_TOKENS))
        self._requests[ticket] = _LookupRequest(losses, decision.arm, decision.arm == NONE)
        return decision

    def shadow_drafters(self, ticket: int) -> Sequence[str]:
        """Return no drafter."""
        return ()

    def observes_round(self, ticket: int) -> bool:
        """Return whether the request may still use the lookup."""
        state = self._requests.get(ticket)
        return state is not None and not state.is_stopped

    def after_round(self, ticket: int, report: RoundReport) -> str | None:
        """Return the arm of the next round, or None to keep the arm in use."""
        state = self._requests.get(ticket)
        if state is None:
            return None
        state.emitted += report.emitted
        plain = self._plain_rounds(report)
        if report.num_drafted:
            plain.num_drafted_since += 1
        else:
            plain.add(report.other_seconds)
        # the engine could not give the row the lookup, or the lookup loses
        state.is_stopped = report.arm != state.arm or self._loses(state, report, plain.seconds)
        state.arm = NONE if state.is_stopped or plain.is_due else self.lookup
        return None if state.arm == report.arm else state.arm

    def _plain_rounds(self, report: RoundReport) -> _PlainRounds:
        """Return the plain rounds to compare a round with.

        A row's share of a round depends on the rows. Of a row alone, the context's power of 4 also
        counts; rows of one batch must share a clock, so that they decode plainly at the same time.
        """
        context = report.context.bit_length() // 2 if report.rows == 1 else 0
        return self._plain.setdefault((report.rows, context), _PlainRounds())

    def _loses(self, state: _LookupRequest, report: RoundReport, plain: float | None) -> bool:
        """Charge a round to the guard; return whether the request should continue without the lookup.

        plain: seconds of a plain round, None if unknown; such a round is charged as a plain one.
        """
        started = report.start_seconds / plain if plain else 0.0
        if report.arm == NONE:
            self.guard.after_plain(state.losses, started)
            return False
        # a round takes at least its draft and a plain round; where no row drafted it takes just that
        spent = 1.0 + (report.draft_seconds / plain if plain else 0.0)
        if plain and report.num_drafted:
            spent = max(spent, (report.draft_seconds + report.other_seconds) / plain)
        return self.guard.after_round(state.losses, report.arm, spent, started, report.emitted)

    def end(self, ticket: int, emitted: int | None = None) -> None:
        """End a request; an unknown ticket is ignored. emitted: tokens of its rounds."""
        state = self._requests.pop(ticket, None)
        if state is None:
            return
        if emitted is not None:
            self.guard.add_unobserved(emitted - state.emitted)
        self.guard.end(state.losses)

    def report(self) -> list[str]:
        """Return the guard's report, one line per arm."""
        return self.guard.report()
