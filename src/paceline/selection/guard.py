"""The guard: what does not pay, by the clock, falls back to plain decoding.

Two levels. In a request, an arm may lose a small share of what the request would take plainly; then
the rest goes without it. In the process, an arm whose requests lose on the whole, with confidence, is
benched: nobody gets it until it is probed again, ever more seldom, within a budget of time. All is
counted in *plain rounds*: seconds over what one round of plain decoding takes at the same place,
which is the cost table's figure scaled by how the clock has read plain rounds in this process.
Constant memory, no thread, no drafter. A loss is positive, a gain negative.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Final

ALLOWED_LOSS: Final = 0.01
"""Share of a request's plain rounds that may be lost before the request goes on without the arm."""

FEWEST_LOST: Final = 1.5
"""Plain rounds that may be lost in any case: a few drafts in a row that are wrong prove nothing."""

TRUST: Final = 2.0
"""How many times as much an arm may lose in a request that gains, with confidence, over requests."""

LOSES: Final = 1.6
"""Standard errors by which an arm must lose, over requests, to be benched: three alike are enough.
Less than trust asks for, since a bench is probed and every losing request is a slow answer."""

GAINS: Final = 2.0
"""Standard errors by which an arm must gain, over requests, to be trusted."""

MEMORY: Final = 0.97
"""What a request still weighs at the next one of the same arm."""

FIRST_PAUSE, LONGEST_PAUSE = 16, 1024
"""Requests until a benched arm is probed; doubled by every probe that fails."""

PROBE_SHARE: Final = 0.003
"""Share of all plain rounds that failed probes may have lost before the next one."""

_CLOCK_MEMORY: Final = 1 - 1 / 64  # of plain rounds by the clock
_CLOCK_ROUNDS: Final = 12  # plain rounds without which the clock is not known
_CLOCK_EVERY: Final = 200  # rounds after which a plain one is due again
_OUTLIER: Final = 3.0  # a round that took so many times its price was interrupted


class PlainClock:
    """How many times its price a plain round takes now, by the clock."""

    def __init__(self) -> None:
        self._clocked = 0.0
        self._priced = 0.0
        self._num_rounds = 0.0
        self._since = 0

    @property
    def factor(self) -> float:
        return self._clocked / self._priced if self._priced else 1.0

    @property
    def is_due(self) -> bool:
        """Whether a plain round is wanted to know what one takes."""
        return self._num_rounds < _CLOCK_ROUNDS or self._since >= _CLOCK_EVERY

    def plain(self, seconds: float, price: float) -> None:
        if self._num_rounds >= _CLOCK_ROUNDS:
            seconds = min(seconds, _OUTLIER * self.factor * price)
        self._clocked = self._clocked * _CLOCK_MEMORY + seconds
        self._priced = self._priced * _CLOCK_MEMORY + price
        self._num_rounds = self._num_rounds * _CLOCK_MEMORY + 1
        self._since = 0

    def passed(self) -> None:
        """A round that was not plain."""
        self._since += 1


@dataclass(slots=True)
class Record:
    """One arm in this process: faded sums over the requests it was used in, and its penalty."""

    loss: float = 0.0
    squares: float = 0.0
    num_requests: int = 0
    pause: int = FIRST_PAUSE
    benched_until: int | None = None  # the request from which it may be probed
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
class Ledger:
    """One request: what its rounds have lost, and what each arm lost with the drafter's start."""

    expected_rounds: float
    loss: float = 0.0
    lost: dict[str, float] = field(default_factory=dict)
    probes: str | None = None  # the benched arm that it tries


class Guard:
    """The records of all arms, kept across requests."""

    def __init__(self) -> None:
        self.clock = PlainClock()
        self._records: dict[str, Record] = {}
        self._num_requests = 0
        self._plain_rounds = 0.0  # what all requests would have taken
        self._probe_loss = 0.0

    # --- the process ------------------------------------------------------------------------------

    def is_benched(self, arm: str) -> bool:
        record = self._records.get(arm)
        return record is not None and record.benched_until is not None

    def admits(self, arm: str) -> bool:
        """Whether a request may start with the arm: not benched, or due for a probe."""
        record = self._records.get(arm)
        if record is None or record.benched_until is None:
            return True
        if record.is_probed or self._num_requests < record.benched_until:
            return False
        return self._probe_loss <= PROBE_SHARE * self._plain_rounds

    def begin(self, arm: str, expected_rounds: float) -> Ledger:
        """A request starts with an arm; expected_rounds: what it would take plainly."""
        self._num_requests += 1
        if not self.is_benched(arm):
            return Ledger(expected_rounds)
        self._records[arm].is_probed = True
        return Ledger(expected_rounds, probes=arm)

    def end(self, ledger: Ledger) -> None:
        """A request is over: its arms' records, benches and probes."""
        for arm, loss in ledger.lost.items():
            record = self._records.setdefault(arm, Record())
            if arm == ledger.probes:
                self._probed(record, loss)
            elif record.benched_until is None:
                record.add(loss)
                if record.score > LOSES:
                    record.benched_until = self._num_requests + record.pause
        if ledger.probes is not None:
            self._records[ledger.probes].is_probed = False

    def _probed(self, record: Record, loss: float) -> None:
        if loss > 0:
            self._probe_loss += loss
            record.pause = min(2 * record.pause, LONGEST_PAUSE)
            record.benched_until = self._num_requests + record.pause
            return
        # back in play, on the strength of this request alone
        record.benched_until = None
        record.loss = record.squares = 0.0
        record.add(loss)

    # --- a request --------------------------------------------------------------------------------

    def after_round(
        self, ledger: Ledger, arm: str, spent: float, started: float, emitted: int
    ) -> bool:
        """Count a round, in plain rounds; True when the request should go on without the arm.

        spent: by the round. started: by starting the drafter before it, which is lost whatever comes
        and so no reason to stop.
        """
        self._plain_rounds += emitted
        loss = spent - emitted
        ledger.lost[arm] = ledger.lost.get(arm, 0.0) + loss + started
        ledger.loss += loss
        # an arm that gains is not to blame for what was lost before it
        return loss > 0 and ledger.loss > self._allowed(ledger, arm)

    def after_plain(self, ledger: Ledger, started: float) -> None:
        """Count a plain round; started: what was spent on drafters all the same."""
        self._plain_rounds += 1
        ledger.loss += started

    def passed(self, num_rounds: int) -> None:
        """Plain rounds that went by unseen."""
        self._plain_rounds += num_rounds

    def _allowed(self, ledger: Ledger, arm: str) -> float:
        """Plain rounds that a request may lose with an arm."""
        record = self._records.get(arm)
        trusted = record is not None and record.score < -GAINS
        allowed = max(FEWEST_LOST, ALLOWED_LOSS * ledger.expected_rounds)
        return allowed * (TRUST if trusted else 1.0)

    # --- for its user -----------------------------------------------------------------------------

    def report(self) -> list[str]:
        """A line for each arm that was used: what it gained or lost, and what is benched and why."""
        lines = []
        for arm, record in sorted(self._records.items()):
            state = (
                f"{-record.loss:+.1f} plain rounds gained of late in {record.num_requests} requests"
            )
            if record.benched_until is not None:
                wait = max(0, record.benched_until - self._num_requests)
                state += f"; benched, to be probed in {wait} requests at the earliest"
            lines.append(f"{arm}: {state}")
        return lines
