"""The gate of drafters: while several rows are in flight, a drafter that does not pay is not called.

All rows wait for every call of a drafter. A call pays if the tokens that it is expected to add are worth
more seconds than it takes, with the verification of its tokens. A token is worth the seconds per token
of recent rounds: a call that gives tokens for less raises the tokens per second of all rows, any other
call lowers them. A drafter that is not called has a short trial after 16 rounds, then 32 and so on, so
that a change of the text is noticed. If the load changes, the next round's decision follows it.

For exact sampling, nothing that is drawn in a round may decide whether it is verified. The gate decides
by earlier rounds alone; no draw of this round changes it. A row that is not asked decodes plainly for a
round, and its drafter reads the tokens written since at its next call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.costs.round_seconds import RoundSeconds
    from paceline.drafting.base import Drafter
    from paceline.drafting.contract import Draft
    from paceline.engine.rows import Row
    from paceline.verification import Verdict

_FIRST_CALLS: Final = 8  # of a drafter, before it is judged
_TRIAL_CALLS: Final = 3
_FIRST_WAIT, _LONGEST_WAIT = 16, 256  # rounds without a call before a trial
_MEMORY: Final = 0.9  # weight of earlier calls per call, and of earlier rounds per round
_KEPT_IN_TRIAL: Final = 0.2  # weight of the calls before a trial
# the median of these calls is the price; one interruption does not count
_TIMED_CALLS: Final = 5


@dataclass(slots=True)
class _Record:
    """The recent calls of one drafter. The counts are weighted sums over calls."""

    num_rows: float = 0.0  # that were asked
    accepted: float = 0.0  # draft tokens of these rows
    verified: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED_CALLS))
    num_unjudged: int = _FIRST_CALLS  # next calls that are made without a decision
    num_skipped: int = 0  # rounds since the last call
    wait: int = _FIRST_WAIT

    def weigh(self, weight: float) -> None:
        """Weigh the calls so far."""
        self.num_rows *= weight
        self.accepted *= weight
        self.verified *= weight

    def count_call(self) -> None:
        """Count a call that is about to be made."""
        self.num_skipped = 0
        self.weigh(_MEMORY)


class Gate:
    """The rule that decides which drafters are called in a round of several rows."""

    def __init__(self, seconds: RoundSeconds) -> None:
        self._seconds = seconds
        self._records: dict[int, _Record] = {}  # by identity, since a drafter may define equality
        # weighted sums over rounds, of all rows
        self._spent, self._emitted = 0.0, 0.0  # seconds, tokens
        self._num_verified = 0  # draft tokens of the last round

    def admits(self, own: Sequence[Row], num_rows: int) -> bool:
        """Return whether a drafter is called in this round. own: its rows. num_rows: in flight."""
        key = id(own[0].drafter)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record()
        if record.num_unjudged:
            record.num_unjudged -= 1
        elif not record.num_rows or self._pays(record, own, num_rows):
            record.wait = _FIRST_WAIT
        else:
            record.num_skipped += 1
            if record.num_skipped <= record.wait:
                return False
            record.wait = min(2 * record.wait, _LONGEST_WAIT)
            record.num_unjudged = _TRIAL_CALLS - 1
            record.weigh(_KEPT_IN_TRIAL)
        record.count_call()
        return True

    def _pays(self, record: _Record, own: Sequence[Row], num_rows: int) -> bool:
        share = len(own) / record.num_rows
        worth = record.accepted * share * self._spent
        call = sorted(record.seconds)[len(record.seconds) // 2] if record.seconds else 0.0
        if worth <= call * self._emitted:  # so the price of verification need not be read
            return False
        verified = record.verified * share
        # all drafters share the price of all tokens; the last round lacks those of a skipped drafter
        added = int(verified) + 1
        together = max(added, self._num_verified + (added if record.num_skipped else 0))
        context = sum(row.num_read for row in own) // len(own)
        seconds = self._seconds.up_to(num_rows, context, together)
        verifying = float(seconds[together] - seconds[0]) * verified / together
        return worth > (call + verifying) * self._emitted

    def learn_call(self, drafter: Drafter, seconds: float) -> None:
        """Learn the seconds of a call that was admitted."""
        self._records[id(drafter)].seconds.append(seconds)

    def learn(
        self,
        rows: Sequence[Row],
        verified: Sequence[Draft],
        verdicts: Sequence[Verdict],
        drafting: float,
    ) -> None:
        """Learn from a judged round of several rows. drafting: seconds of all calls."""
        num_accepted = num_verified = context = 0
        for row, draft, verdict in zip(rows, verified, verdicts, strict=True):
            context += row.num_read
            if not row.is_asked:
                continue
            accepted, drafted = len(verdict.path), len(draft.tokens)
            num_accepted += accepted
            num_verified += drafted
            record = self._records[id(row.drafter)]
            record.num_rows += 1.0
            record.accepted += accepted
            record.verified += drafted
        num_rows = len(rows)
        seconds = self._seconds.up_to(num_rows, context // num_rows, num_verified)[num_verified]
        self._spent = _MEMORY * self._spent + float(seconds) + drafting
        self._emitted = _MEMORY * self._emitted + num_rows + num_accepted
        self._num_verified = num_verified
