"""The guard: an arm that does not pay, by the clock, is replaced by plain decoding.

It works at two levels. In a request, an arm may lose a small share of the rounds that the request
would take plainly; then the request continues without the arm. In the process, an arm whose requests
lose with confidence is suspended. No request gets it until it is probed again. Probes become rarer
as they fail and have a budget of time.

Losses are counted in *plain rounds*: seconds over those of one round of plain decoding at the same
place, which is the cost table's price scaled by the clock's plain rounds in this process. A loss is
positive, a gain negative. Memory is constant. The guard knows no drafter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Final

ALLOWED_LOSS: Final = 0.01
"""Share of a request's plain rounds that an arm may lose before the request continues without it."""

MIN_ALLOWED_LOSS: Final = 1.5
"""Plain rounds that any request may lose: a few wrong drafts in a row prove nothing."""

TRUST: Final = 2.0
"""Factor on the allowed loss of an arm that gains, with confidence, over requests."""

LOSES: Final = 1.6
"""Standard errors by which an arm must lose, over requests, to be suspended: three equal losses.
Less than trust needs, because a suspension is probed and every losing request is a slow answer."""

GAINS: Final = 2.0
"""Standard errors by which an arm must gain, over requests, to be trusted."""

MEMORY: Final = 0.97
"""Weight that a request keeps at the next request of the same arm."""

FIRST_PAUSE, LONGEST_PAUSE = 16, 1024
"""Requests until a suspended arm is probed; doubled by every probe that fails."""

PROBE_SHARE: Final = 0.003
"""Share of all plain rounds that failed probes may have lost before the next probe."""

_CLOCK_MEMORY: Final = 1 - 1 / 64  # weight that a plain round keeps at the next one
_CLOCK_ROUNDS: Final = 12  # plain rounds before the factor is known
_CLOCK_EVERY: Final = 200  # drafted rounds after which a plain round is due
_OUTLIER: Final = 3.0  # a round that takes more than this multiple of its price was interrupted


class PlainRoundClock:
    """The ratio of a plain round's seconds by the clock to its price in the cost table."""

    def __init__(self) -> None:
        self._clocked = 0.0
        self._priced = 0.0
        self._num_rounds = 0.0
        self._num_drafted_since = 0

    @property
    def factor(self) -> float:
        return self._clocked / self._priced if self._priced else 1.0

    @property
    def is_due(self) -> bool:
        """True if a plain round is needed to measure the factor."""
        return self._num_rounds < _CLOCK_ROUNDS or self._num_drafted_since >= _CLOCK_EVERY

    def add_plain_round(self, seconds: float, price: float) -> None:
        if self._num_rounds >= _CLOCK_ROUNDS:
            seconds = min(seconds, _OUTLIER * self.factor * price)
        self._clocked = self._clocked * _CLOCK_MEMORY + seconds
        self._priced = self._priced * _CLOCK_MEMORY + price
        self._num_rounds = self._num_rounds * _CLOCK_MEMORY + 1
        self._num_drafted_since = 0

    def add_drafted_round(self) -> None:
        self._num_drafted_since += 1


@dataclass(slots=True)
class ArmRecord:
    """One arm in this process: decaying sums over the requests that used it, and its suspension."""

    loss: float = 0.0
    squares: float = 0.0
    num_requests: int = 0
    pause: int = FIRST_PAUSE
    suspended_until: int | None = None  # number of the request from which it may be probed
    is_probed: bool = False

    @property
    def score(self) -> float:
        """The loss in its own standard errors: the self-normalised sum."""
        return self.loss / sqrt(self.squares) if self.squares else 0.0

    def add(self, loss: float) -> None:
        self.loss = self.loss * MEMORY + loss
        self.squares = self.squares * MEMORY + loss * loss
        self.num_requests += 1


@dataclass(slots=True)
class RequestLosses:
    """The losses of one request's rounds, and of each arm with the starts of its drafter."""

    expected_rounds: float
    loss: float = 0.0
    by_arm: dict[str, float] = field(default_factory=dict)
    probed_arm: str | None = None  # the suspended arm that the request tries


class Guard:
    """The records of all arms, kept across requests.

    allowed_loss: plain rounds that any request may lose before it continues without its arm.
    """

    def __init__(self, allowed_loss: float = MIN_ALLOWED_LOSS) -> None:
        self._allowed = allowed_loss
        self.clock = PlainRoundClock()
        self._records: dict[str, ArmRecord] = {}
        self._num_requests = 0
        self._plain_rounds = 0.0  # that all requests would have taken
        self._probe_loss = 0.0

    # --- the process ------------------------------------------------------------------------------

    def is_suspended(self, arm: str) -> bool:
        record = self._records.get(arm)
        return record is not None and record.suspended_until is not None

    def admits(self, arm: str) -> bool:
        """Return whether a request may start with the arm: it is not suspended, or a probe is due."""
        record = self._records.get(arm)
        if record is None or record.suspended_until is None:
            return True
        if record.is_probed or self._num_requests < record.suspended_until:
            return False
        return self._probe_loss <= PROBE_SHARE * self._plain_rounds

    def begin(self, arm: str, expected_rounds: float) -> RequestLosses:
        """Begin a request with an arm. expected_rounds: the rounds it would take plainly."""
        self._num_requests += 1
        if not self.is_suspended(arm):
            return RequestLosses(expected_rounds)
        self._records[arm].is_probed = True
        return RequestLosses(expected_rounds, probed_arm=arm)

    def end(self, losses: RequestLosses) -> None:
        """Add a request to its arms' records; suspend arms that lose, judge its probe."""
        for arm, loss in losses.by_arm.items():
            record = self._records.setdefault(arm, ArmRecord())
            if arm == losses.probed_arm:
                self._judge_probe(record, loss)
            elif record.suspended_until is None:
                record.add(loss)
                if record.score > LOSES:
                    record.suspended_until = self._num_requests + record.pause
        if losses.probed_arm is not None:
            self._records[losses.probed_arm].is_probed = False

    def _judge_probe(self, record: ArmRecord, loss: float) -> None:
        if loss > 0:
            self._probe_loss += loss
            record.pause = min(2 * record.pause, LONGEST_PAUSE)
            record.suspended_until = self._num_requests + record.pause
            return
        # the arm returns with this request alone on its record
        record.suspended_until = None
        record.loss = record.squares = 0.0
        record.add(loss)

    # --- a request --------------------------------------------------------------------------------

    def after_round(
        self, losses: RequestLosses, arm: str, spent: float, started: float, emitted: int
    ) -> bool:
        """Count a drafted round; return True when the request should continue without the arm.

        spent: plain rounds that the round took. started: plain rounds that starting the drafter took
        before it; they are lost in any case and so are no reason to stop.
        """
        self._plain_rounds += emitted
        loss = spent - emitted
        losses.by_arm[arm] = losses.by_arm.get(arm, 0.0) + loss + started
        losses.loss += loss
        # an arm that gains is not to blame for earlier losses
        return loss > 0 and losses.loss > self._allowed_loss(losses, arm)

    def after_plain(self, losses: RequestLosses, started: float) -> None:
        """Count a plain round. started: plain rounds that starts and shadow drafts took before it."""
        self._plain_rounds += 1
        losses.loss += started

    def add_unobserved(self, num_rounds: int) -> None:
        """Count plain rounds that were not reported."""
        self._plain_rounds += num_rounds

    def _allowed_loss(self, losses: RequestLosses, arm: str) -> float:
        record = self._records.get(arm)
        is_trusted = record is not None and record.score < -GAINS
        allowed = max(self._allowed, ALLOWED_LOSS * losses.expected_rounds)
        return allowed * (TRUST if is_trusted else 1.0)

    # --- for the user -----------------------------------------------------------------------------

    def report(self) -> list[str]:
        """Return a line per used arm: its recent gain or loss, and its suspension."""
        lines = []
        for arm, record in sorted(self._records.items()):
            state = (
                f"{-record.loss:+.1f} plain rounds gained recently, {record.num_requests} requests"
            )
            if record.suspended_until is not None:
                wait = max(0, record.suspended_until - self._num_requests)
                state += f"; suspended, next probe after {wait} requests or more"
            lines.append(f"{arm}: {state}")
        return lines
