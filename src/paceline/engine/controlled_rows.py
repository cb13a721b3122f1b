"""Rows whose arm may change between rounds: drafts made beside the arm in use, and what they were worth.

The engine's side of a controller: it starts and asks the drafters that the controller names, compares
their drafts with the text once that is written, and charges all of it to the row. Who decides, and
how, is not known here. A drafter that was left stays started, so that coming back costs only what
was written meanwhile. *Beside* means: not the arm in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

from paceline.contracts import DraftOutcome, RoundReport
from paceline.drafting.contract import prepare_piece, read_drafts, read_length
from paceline.drafting.draft_replay import count_accepted
from paceline.engine.containment import asking, contained

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.contracts import Context, Decision
    from paceline.drafting.base import Drafter
    from paceline.engine.containment import DisabledDrafters
    from paceline.engine.memory import DrafterMemory
    from paceline.engine.rows import Row


CONTROLLER: Final = "controller"
"""Whose fault a row's failure is, in its error."""


class ArmController(Protocol):
    """Who is asked, by ticket. Nothing it is told depends on tokens that are still to be verified."""

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        """The policy's decision as it is to be carried out. room: tokens yet to be emitted."""

    def shadow_drafters(self, ticket: int) -> Sequence[str]:
        """Drafters that should make a draft beside the arm in use in the coming round."""

    def after_round(self, ticket: int, seen: RoundReport) -> str | None:
        """The arm to go on with, None for the one in use."""

    def observes_round(self, ticket: int) -> bool:
        """Whether it wants to see the coming round."""

    def end(self, ticket: int, emitted: int) -> None:
        """The request is over, after so many tokens of its rounds."""


@dataclass(slots=True)
class _ShadowDraft:
    """A draft whose worth the text has yet to tell."""

    drafter: str
    start: int  # tokens the row had
    tokens: list[int]
    parents: list[int] | None
    allowed: int
    known: int = 0

    def tell(self, row: Row) -> DraftOutcome:
        written = row.tokens[self.start :]
        right = count_accepted(self.tokens, self.parents, written)
        outcomes = DraftOutcome.of(
            self.drafter, len(self.tokens), self.allowed, right, len(written), self.known
        )
        self.known = right
        return outcomes


@dataclass(slots=True)
class _Mark:
    """Where a row stood before the round."""

    num_tokens: int
    draft: float
    other: float
    start: float  # seconds of starting its own drafter, since the round before
    beside: float  # seconds of drafts beside, and of starting who makes them


class ControlledRows:
    """The controlled rows of one engine."""

    def __init__(
        self,
        controller: ArmController,
        drafters: Mapping[str, Drafter],
        chunk: int,
        memory: DrafterMemory,
        has_memory: Callable[[Row, str], bool],
        disabled: DisabledDrafters,
    ) -> None:
        """chunk: tokens of a drafter's prefill between two rounds. has_memory: whether a row may start
        another drafter in addition to its arm's. disabled: drafters that are not used.
        """
        self.controller = controller
        self._drafters = drafters
        self._chunk = chunk
        self._memory = memory
        self._has_memory = has_memory
        self._disabled = disabled
        self._shadows: dict[int, list[_ShadowDraft]] = {}
        self._charged: dict[int, float] = {}  # draft seconds of each row that were told of

    def begin(self, row: Row, context: Context, decision: Decision) -> Decision:
        self._shadows[row.id] = []
        self._charged[row.id] = row.seconds.draft
        return self.controller.begin(row.id, context, decision, row.max_total - len(row.tokens))

    def end(self, row: Row) -> None:
        if self._shadows.pop(row.id, None) is None:
            return
        del self._charged[row.id]
        # a controller may be anybody's code
        with contained(lambda error: row.fail(CONTROLLER, error)):
            self.controller.end(row.id, max(len(row.tokens) - row.num_prompt - 1, 0))

    def controls(self, row: Row) -> bool:
        return row.id in self._shadows

    # --- a round ----------------------------------------------------------------------------------

    def before_round(self, rows: Sequence[Row]) -> dict[int, _Mark]:
        """Make the drafts that are wanted; return by ticket where each controlled row stands.

        A row whose controller fails here fails alone.
        """
        marks: dict[int, _Mark] = {}
        for row in rows:
            if not self.controls(row):
                continue
            with contained(lambda error, row=row: row.fail(CONTROLLER, error)):  # type: ignore[misc]
                if self.controller.observes_round(row.id):
                    marks[row.id] = self._mark(row)
        return marks

    def _mark(self, row: Row) -> _Mark:
        began = perf_counter()
        started = row.seconds.draft - self._charged[row.id]
        for name in self.controller.shadow_drafters(row.id):
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
        """Tell the controller of a row's round; the arm it should go on with, None for the same."""
        began = perf_counter()
        beside = self._shadows[row.id]
        outcomes = [draft.tell(row) for draft in beside]
        self._shadows[row.id] = [
            draft for draft, one in zip(beside, outcomes, strict=True) if not one.is_final
        ]
        stats = row.rounds[-1]
        allowed = min(row.limit_at(mark.num_tokens), row.num_draft_tokens)
        emitted = len(row.tokens) - mark.num_tokens
        if allowed > 0:
            # the target's own token stands behind what was accepted
            outcomes.append(
                DraftOutcome.of(row.drafter_name, stats.drafted, allowed, stats.accepted, emitted)
            )
        seen = RoundReport(
            arm=row.arm,
            stats=stats,
            emitted=emitted,
            context=mark.num_tokens - 1,
            rows=num_rows,
            room=row.max_total - len(row.tokens),
            outcomes=outcomes,
            start_seconds=mark.start,
            shadow_seconds=mark.beside,
            draft_seconds=row.seconds.draft - mark.draft,
            other_seconds=row.seconds.verify + row.seconds.commit - mark.other,
        )
        self._charged[row.id] = row.seconds.draft
        arm = self.controller.after_round(row.id, seen)
        row.seconds.choose += perf_counter() - began
        return arm

    def _draft_beside(self, row: Row, name: str) -> None:
        """A draft that nobody verifies; a drafter that fails at it is not asked again for the row."""
        limit = row.limit_at(len(row.tokens), any_length=True)
        if name in row.barred or name in self._disabled or limit < 1:
            return
        with asking(row, name, lambda name, error: self._drop(row, name, error)):
            self._try_beside(row, name, limit)

    def _try_beside(self, row: Row, name: str, limit: int) -> None:
        drafter = self._drafters[name]
        if self._memory.overlap(name, row.drafter_name) or not self._is_ready(row, name):
            return
        length = read_length(drafter)
        [draft] = read_drafts(drafter.propose([row], [limit]), [row], [limit], length)
        allowed = min(limit, length)
        self._shadows[row.id].append(
            _ShadowDraft(name, len(row.tokens), draft.tokens, draft.parents, allowed)
        )

    def _drop(self, row: Row, name: str, error: BaseException) -> None:
        """Finish a drafter that failed and is not in use, and use it no more. The row goes on."""
        row.note_failure(name, error)
        if row.kept.pop(name, None) is not None:
            with contained(lambda error: row.note_failure(name, error)):
                self._drafters[name].finish([row])

    def _is_ready(self, row: Row, name: str) -> bool:
        """Start the drafter if need be, or go on with its prefill; whether it can draft now."""
        drafter = self._drafters[name]
        if name not in row.kept:
            if any(self._memory.overlap(name, other) for other in row.kept):
                return False
            if not self._has_memory(row, name):
                row.barred.add(name)
                return False
            row.kept[name] = False
            row.pieces[name] = 0
            drafter.start([row])
        if not row.kept[name]:
            row.kept[name] = prepare_piece(drafter, row, self._chunk, row.pieces[name])
            row.pieces[name] += 1
        return row.kept[name]
