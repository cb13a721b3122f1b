"""What drafters hold of rows: whether another row has room, and who holds it in the same place.

A drafter is known here by its name in the engine; its own hash and equality are never asked.
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
    """The drafters of one engine, and the bound on what their rows hold together."""

    def __init__(self, drafters: Mapping[str, Drafter], max_mb: float | None) -> None:
        """max_mb: None is no bound."""
        self._drafters = drafters
        self._max_mb = max_mb
        self._holders: dict[str, tuple[Drafter, list[Drafter]]] = {}

    def holders(self, name: str) -> list[Drafter]:
        """Who holds the state of a drafter's rows. Asked once, so that it fails before the first row."""
        drafter = self._drafters[name]
        known = self._holders.get(name)
        if known is None or known[0] is not drafter:
            known = self._holders[name] = (drafter, list(drafter.holders()))
        return known[1]

    def overlap(self, one: str, other: str) -> bool:
        """Whether they keep their rows' state in the same place: a row may have only one of them."""
        if NONE in (one, other):
            return False
        return any(a is b for a in self.holders(one) for b in self.holders(other))

    def has_room(self, row: Row, wanted: str, rows: Sequence[Row]) -> bool:
        """Whether the drafters' rows would stay within the bound with this one for the row, too.

        Raises what the wanted drafter raises; another one that fails here fails in its own rows.
        """
        if self._max_mb is None or wanted == NONE:
            return True
        users: dict[int, list[tuple[Row, str]]] = {}
        found: dict[int, Drafter] = {}
        for other in rows:
            names = {other.drafter_name, *other.kept} | ({wanted} if other is row else set())
            for name in names - {NONE}:
                for holder in self.holders(name):
                    found[id(holder)] = holder
                    users.setdefault(id(holder), []).append((other, name))
        own = {id(holder) for holder in self.holders(wanted)}
        needed = 0.0
        for key, holder in found.items():
            lengths = [other.max_total for other, _ in users[key]]
            if key in own:
                needed += read_state_bytes(holder, lengths)
                continue
            with contained(lambda error, key=key: _blame(users[key], error)):  # type: ignore[misc]
                needed += read_state_bytes(holder, lengths)
        return needed <= self._max_mb * 1e6


def _blame(users: Sequence[tuple[Row, str]], error: BaseException) -> None:
    for row, name in users:
        if name == row.drafter_name:
            row.fail_by(name, error)
        else:
            row.note_failure(name, error)
