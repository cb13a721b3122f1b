"""Rows whose arm may change between rounds: drafts made beside the arm in use, and what they were worth.

The engine's side of a watch: it starts and asks the drafters that the watch wants scored, compares
their drafts with the text once that is written, and charges all of it to the row. Who decides, and
how, is not known here. A drafter that was left stays started, so that coming back costs only what
was written meanwhile. *Beside* means: not the arm in use.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

from paceline.contracts import NONE, RoundSeen, Scored
from paceline.drafting.foresight import num_on_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.contracts import Context, Decision
    from paceline.drafting.base import Drafter
    from paceline.engine.rows import Row


WATCH: Final = "watch"
"""Whose fault a row's failure is, in its error."""


class Watch(Protocol):
    """Who is asked, by ticket. Nothing it is told depends on tokens that are still to be verified."""

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        """The policy's decision as it is to be carried out. room: tokens yet to be emitted."""

    def to_score(self, ticket: int) -> Sequence[str]:
        """Drafters that should make a draft beside the arm in use in the coming round."""

    def after_round(self, ticket: int, seen: RoundSeen) -> str | None:
        """The arm to go on with, None for the one in use."""

    def has_eyes_on(self, ticket: int) -> bool:
        """Whether it wants to see the coming round."""

    def end(self, ticket: int, emitted: int) -> None:
        """The request is over, after so many tokens of its rounds."""


@dataclass(slots=True)
class _Beside:
    """A draft whose worth the text has yet to tell."""

    drafter: str
    start: int  # tokens the row had
    tokens: list[int]
    parents: list[int] | None
    allowed: int
    known: int = 0

    def tell(self, row: Row) -> Scored:
        written = row.tokens[self.start :]
        right = num_on_text(self.tokens, self.parents, written)
        scored = Scored.of(
            self.drafter, len(self.tokens), self.allowed, right, len(written), self.known
        )
        self.known = right
        return scored


@dataclass(slots=True)
class _Mark:
    """Where a row stood before the round."""

    num_tokens: int
    draft: float
    other: float
    start: float  # seconds of starting its own drafter, since the round before
    beside: float  # seconds of drafts beside, and of starting who makes them


class Watcher:
    """The watched rows of one engine."""

    def __init__(
        self,
        watch: Watch,
        drafters: Mapping[str, Drafter],
        chunk: int,
        has_memory: Callable[[Row, Drafter], bool],
    ) -> None:
        """chunk: tokens of a drafter's prefill between two rounds."""
        self.watch = watch
        self._drafters = drafters
        self._chunk = chunk
        self._has_memory = has_memory
        self._beside: dict[int, list[_Beside]] = {}
        self._charged: dict[int, float] = {}  # draft seconds of each row that were told of

    def begin(self, row: Row, context: Context, decision: Decision) -> Decision:
        self._beside[row.id] = []
        self._charged[row.id] = row.seconds.draft
        return self.watch.begin(row.id, context, decision, row.max_total - len(row.tokens))

    def end(self, row: Row) -> None:
        if self._beside.pop(row.id, None) is None:
            return
        del self._charged[row.id]
        try:
            self.watch.end(row.id, max(len(row.tokens) - row.num_prompt - 1, 0))
        except Exception as error:  # noqa: BLE001 - as a policy, it may come from anywhere
            row.fail(WATCH, error)

    def watches(self, row: Row) -> bool:
        return row.id in self._beside

    # --- a round ----------------------------------------------------------------------------------

    def before_round(self, rows: Sequence[Row]) -> dict[int, _Mark]:
        """Make the drafts that are wanted; ticket -> where each watched row stands.

        A row whose watch fails at it fails alone.
        """
        marks: dict[int, _Mark] = {}
        for row in rows:
            if not self.watches(row):
                continue
            try:
                if self.watch.has_eyes_on(row.id):
                    marks[row.id] = self._mark(row)
            except Exception as error:  # noqa: BLE001 - as a policy, it may come from anywhere
                row.fail(WATCH, error)
        return marks

    def _mark(self, row: Row) -> _Mark:
        began = perf_counter()
        started = row.seconds.draft - self._charged[row.id]
        for name in self.watch.to_score(row.id):
            self._draft_beside(row, name)
        spent = perf_counter() - began
        row.seconds.draft += spent
        return _Mark(
            len(row.tokens),
            row.seconds.draft,
            row.seconds.verify + row.seconds.commit,
            started,
            spent,
        )

    def after_round(self, row: Row, mark: _Mark, num_rows: int) -> str | None:
        """Tell the watch of a row's round; the arm it should go on with, None for the same."""
        began = perf_counter()
        beside = self._beside[row.id]
        scored = [draft.tell(row) for draft in beside]
        self._beside[row.id] = [
            draft for draft, one in zip(beside, scored, strict=True) if not one.is_final
        ]
        stats, name = row.rounds[-1], row.drafter.name
        allowed = min(row.limit_at(mark.num_tokens), row.drafter.num_draft_tokens)
        emitted = len(row.tokens) - mark.num_tokens
        if allowed > 0:
            # the target's own token stands behind what was accepted
            scored.append(Scored.of(name, stats.drafted, allowed, stats.accepted, emitted))
        seen = RoundSeen(
            arm=row.arm,
            stats=stats,
            emitted=emitted,
            context=mark.num_tokens - 1,
            rows=num_rows,
            room=row.max_total - len(row.tokens),
            scored=scored,
            start_seconds=mark.start,
            beside_seconds=mark.beside,
            draft_seconds=row.seconds.draft - mark.draft,
            other_seconds=row.seconds.verify + row.seconds.commit - mark.other,
        )
        self._charged[row.id] = row.seconds.draft
        arm = self.watch.after_round(row.id, seen)
        row.seconds.choose += perf_counter() - began
        return arm

    def _draft_beside(self, row: Row, name: str) -> None:
        """A draft that nobody verifies; a drafter that fails at it is not asked again for the row."""
        drafter = self._drafters[name]
        limit = row.limit_at(len(row.tokens), any_length=True)
        if drafter in row.barred or limit < 1 or overlap(drafter, row.drafter):
            return
        try:
            if not self._is_ready(row, drafter):
                return
            drafts = drafter.propose([row], [limit])
            length = drafts.lengths[0]
            parents = None if drafts.parents is None else drafts.parents[0, :length].tolist()
            tokens = drafts.tokens[0, :length].tolist()
        except Exception:  # noqa: BLE001 - nothing of the row depends on it
            row.barred.add(drafter)
            row.kept.pop(drafter, None)
            with suppress(Exception):
                drafter.finish([row])
            return
        allowed = min(limit, drafter.num_draft_tokens)
        self._beside[row.id].append(_Beside(name, len(row.tokens), tokens, parents, allowed))

    def _is_ready(self, row: Row, drafter: Drafter) -> bool:
        """Start the drafter if need be, or go on with its prefill; whether it can draft now."""
        if drafter not in row.kept:
            if any(overlap(drafter, other) for other in row.kept):
                return False
            if not self._has_memory(row, drafter):
                row.barred.add(drafter)
                return False
            row.kept[drafter] = False
            drafter.start([row])
        if not row.kept[drafter]:
            row.kept[drafter] = drafter.prepare(row, self._chunk)
        return row.kept[drafter]


def overlap(one: Drafter, other: Drafter) -> bool:
    """Whether they keep their rows' state in the same place, so that a row may have only one of them."""
    return other.name != NONE and any(a is b for a in one.holders() for b in other.holders())
