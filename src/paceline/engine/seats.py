"""The drafters of an engine's rows: which one is in use, which others are started, and their memory.

A drafter that a row no longer uses may stay started, so that a return to it costs only the text that
was written since. A drafter may be the user's own code: its exceptions end its own row only. It is
identified by its name in the engine, never by its own hash or equality.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from paceline.contracts import NONE, Decision, split_arm
from paceline.drafting.contract import prepare_piece, read_drafts, read_length, read_state_bytes
from paceline.engine.containment import DisabledDrafters, asking, contained
from paceline.engine.decisions import check_decision
from paceline.engine.rows import StartedDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.drafting.base import Drafter
    from paceline.drafting.contract import Draft
    from paceline.engine.rows import Row


class Seats:
    """The drafters of one engine's rows: starts, prefills, changes and ends."""

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        rows: Sequence[Row],
        chunk: int,
        max_drafter_mb: float | None,
    ) -> None:
        """rows: the engine's rows in flight. chunk: tokens of a drafter's own prefill per step.
        max_drafter_mb: bound on the memory of all drafters' rows; None is no bound.
        """
        self.drafters = drafters
        self.disabled = DisabledDrafters()
        self._rows = rows
        self._chunk = chunk
        self._max_mb = max_drafter_mb
        self._holders: dict[str, tuple[Drafter, list[Drafter]]] = {}

    def is_usable(self, row: Row, name: str) -> bool:
        """Return whether a row's controller may use the drafter."""
        return name not in row.excluded and name not in self.disabled

    def check(self, given: Any) -> Decision:
        """Return the checked decision, with the arm `none` if its drafter is disabled."""
        decision = check_decision(given)
        name = decision.drafter
        if name not in self.disabled:
            return decision
        policy = f"{decision.policy}, set aside: {name}"
        return replace(decision, arm=NONE, propensity=1.0, policy=policy)

    def assign(self, row: Row, decision: Decision) -> None:
        """Start the decision's drafter for a prefilled row, or `none` if there is no memory for it."""
        row.decision = decision
        with asking(row, decision.drafter):
            if not self._make_room(row, decision.drafter):
                row.decision = Decision(NONE, policy=f"no memory for {decision.arm}")
        if row.finish_reason is None:
            self._use(row, row.decision.arm)

    def switch(self, row: Row, arm: str, keeps_others: bool) -> None:
        """Change the arm of a row in flight.

        keeps_others: whether the row's other drafters stay started, if they do not share their state
        with the new one.
        """
        wanted, left = split_arm(arm)[0], row.drafter_name
        row.switches.append((len(row.tokens) - row.num_prompt, arm))
        if wanted == left:
            row.arm = arm
            return
        if left == NONE:
            row.started.pop(NONE, None)
        row.arm, row.drafter = NONE, self.drafters[NONE]
        with asking(row, wanted):
            for name in list(row.started):
                if name != wanted and (not keeps_others or self._overlap(name, wanted)):
                    self._finish_charged(row, name)
            if wanted not in row.started and not self._make_room(row, wanted):
                row.switches[-1] = (row.switches[-1][0], NONE)
                arm = NONE
        if row.finish_reason is None:
            self._use(row, arm)

    def _use(self, row: Row, arm: str) -> None:
        """Set the arm of the next round; start its drafter unless it is started."""
        name = split_arm(arm)[0]
        row.arm, row.drafter, row.num_draft_tokens = arm, self.drafters[name], 0
        is_started = name in row.started
        row.in_use = row.started.setdefault(name, StartedDrafter())
        if not is_started:
            self._work(row, lambda: self._start(row, name))

    def _start(self, row: Row, name: str) -> None:
        self._holders_of(name)
        self.drafters[name].start([row])

    def prepare(self) -> None:
        """Do one piece of the prefill of each row's drafter in use."""
        for row in self._rows:
            if not row.in_use.is_prepared and row.is_prefilled and row.finish_reason is None:
                self._work(row, lambda row=row: self._prepare(row, row.drafter_name))  # type: ignore[misc]

    def _prepare(self, row: Row, name: str) -> None:
        started = row.started[name]
        started.is_prepared = prepare_piece(
            self.drafters[name], row, self._chunk, started.num_pieces
        )
        started.num_pieces += 1

    def _work(self, row: Row, act: Callable[[], None]) -> None:
        """Run work of the drafter in use; charge its seconds and its failure to the row."""
        began = perf_counter()
        with asking(row, row.drafter_name):
            act()
        row.seconds.draft += perf_counter() - began

    # --- memory -----------------------------------------------------------------------------------

    def _make_room(self, row: Row, wanted: str) -> bool:
        for other in (row, *self._rows):
            if self._has_room(row, wanted):
                return True
            for name in list(other.started):
                if name != other.drafter_name:
                    self._finish_charged(other, name)
        return self._has_room(row, wanted)

    def _holders_of(self, name: str) -> list[Drafter]:
        """Return the holders of the state of a drafter's rows, asked once, before its first row."""
        drafter = self.drafters[name]
        known = self._holders.get(name)
        if known is None or known[0] is not drafter:
            known = self._holders[name] = (drafter, list(drafter.holders()))
        return known[1]

    def _overlap(self, one: str, other: str) -> bool:
        """Return whether two drafters share the holder of their rows' state; a row may have only one."""
        if NONE in (one, other):
            return False
        return any(a is b for a in self._holders_of(one) for b in self._holders_of(other))

    def _has_room(self, row: Row, wanted: str) -> bool:
        """Return whether all drafters' rows stay within the bound if the row gets the wanted drafter.

        Raises what the wanted drafter raises; any other drafter that fails here fails its own rows.
        """
        if self._max_mb is None or wanted == NONE:
            return True
        users: dict[int, list[tuple[Row, str]]] = {}
        holders: dict[int, Drafter] = {}
        for other in self._rows:
            names = {*other.started, *((wanted,) if other is row else ())}
            for name in names - {NONE}:
                for holder in self._holders_of(name):
                    holders[id(holder)] = holder
                    users.setdefault(id(holder), []).append((other, name))
        own = {id(holder) for holder in self._holders_of(wanted)}
        needed = 0.0
        for key, holder in holders.items():
            lengths = [other.max_total for other, _ in users[key]]
            if key in own:
                needed += read_state_bytes(holder, lengths)
                continue
            with contained(lambda error, key=key: _fail_users(users[key], error)):  # type: ignore[misc]
                needed += read_state_bytes(holder, lengths)
        return needed <= self._max_mb * 1e6

    def _finish_charged(self, row: Row, name: str) -> None:
        began = perf_counter()
        self._finish(row, name)
        row.seconds.draft += perf_counter() - began

    def _finish(self, row: Row, name: str) -> None:
        """Finish a drafter that is not in use; if it fails, the row continues."""
        del row.started[name]
        with asking(row, name, row.note_failure):
            self.drafters[name].finish([row])

    def finish_all(self, row: Row) -> None:
        """Finish the drafters of a row that has ended, and count their failures."""
        tokens = list(row.tokens)  # a drafter may change the row's own
        for name in row.started:
            fail = row.fail_by if name == row.drafter_name else row.note_failure
            with contained(lambda error, name=name, fail=fail: fail(name, error)):  # type: ignore[misc]
                self.drafters[name].finish([row])
        row.tokens = tokens
        self.disabled.count(row)

    # --- shadow drafts ----------------------------------------------------------------------------

    def propose_shadow(self, row: Row, name: str, limit: int) -> tuple[Draft, int] | None:
        """Return a draft of at most `limit` tokens that nobody verifies, and its maximum length.

        Return None if the drafter is in use, not usable, or not prepared yet. In the last case,
        do a piece of its prefill. A drafter that fails here is not asked again for the row.
        """
        if name == row.drafter_name or not self.is_usable(row, name):
            return None
        with asking(row, name, lambda name, error: self._drop(row, name, error)):
            if self._prepare_shadow(row, name):
                drafter = self.drafters[name]
                length = read_length(drafter)
                [draft] = read_drafts(drafter.propose([row], [limit]), [row], [limit], length)
                return draft, min(limit, length)
        return None

    def _prepare_shadow(self, row: Row, name: str) -> bool:
        """Start the drafter, or continue its own prefill; return whether it can draft now."""
        if name not in row.started:
            if any(self._overlap(name, other) for other in row.started):
                return False
            if not self._has_room(row, name):
                row.excluded.add(name)
                return False
            row.started[name] = StartedDrafter()
            self.drafters[name].start([row])
        if not row.started[name].is_prepared:
            self._prepare(row, name)
        return row.started[name].is_prepared

    def _drop(self, row: Row, name: str, error: BaseException) -> None:
        row.note_failure(name, error)
        if name in row.started:
            self._finish(row, name)


def _fail_users(users: Sequence[tuple[Row, str]], error: BaseException) -> None:
    """Fail the rows that draft with a failed drafter; note it for those that only started it."""
    for row, name in users:
        if name == row.drafter_name:
            row.fail_by(name, error)
        else:
            row.note_failure(name, error)
