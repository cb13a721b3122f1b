"""The memory of drafters: whether another row has room, and which drafters share their state.

A drafter is identified by its name in the engine, never by its own hash or equality.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.contracts import NONE
from paceline.drafting.contract import read_state_bytes
from paceline.engine.containment import contained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.drafting.base import Drafter
    from paceline.engine.rows import Row


class DrafterMemory:
    """The bound on the memory that the drafters of an engine's rows hold together."""

    def __init__(
        self, drafters: Mapping[str, Drafter], rows: Sequence[Row], max_mb: float | None
    ) -> None:
        """rows: the engine's rows in flight. max_mb: None is no bound."""
        self._drafters = drafters
        self._rows = rows
        self._max_mb = max_mb
        self._holders: dict[str, tuple[Drafter, list[Drafter]]] = {}

    def holders(self, name: str) -> list[Drafter]:
        """Return the holders of the state of a drafter's rows, asked once, before its first row."""
        drafter = self._drafters[name]
        known = self._holders.get(name)
        if known is None or known[0] is not drafter:
            known = self._holders[name] = (drafter, list(drafter.holders()))
        return known[1]

    def overlap(self, one: str, other: str) -> bool:
        """Return whether two drafters share the holder of their rows' state; a row may have only one."""
        if NONE in (one, other):
            return False
        return any(a is b for a in self.holders(one) for b in self.holders(other))

    def has_room(self, row: Row, wanted: str) -> bool:
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
                for holder in self.holders(name):
                    holders[id(holder)] = holder
                    users.setdefault(id(holder), []).append((other, name))
        own = {id(holder) for holder in self.holders(wanted)}
        needed = 0.0
        for key, holder in holders.items():
            lengths = [other.max_total for other, _ in users[key]]
            if key in own:
                needed += read_state_bytes(holder, lengths)
                continue
            with contained(lambda error, key=key: _fail_users(users[key], error)):  # type: ignore[misc]
                needed += read_state_bytes(holder, lengths)
        return needed <= self._max_mb * 1e6


def _fail_users(users: Sequence[tuple[Row, str]], error: BaseException) -> None:
    """Fail the rows that draft with a failed drafter; note it for those that only started it."""
    for row, name in users:
        if name == row.drafter_name:
            row.fail_by(name, error)
        else:
            row.note_failure(name, error)
