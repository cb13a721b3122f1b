"""A controller that changes its mind all the time, to see that no text depends on it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Context, Decision, RoundReport


class RandomController:
    """After most rounds another arm, and before each round drafts beside it, both by lot.

    What the rounds brought moves the lots too, as it moves a real controller. `seen` keeps every round,
    `ended` the tickets that were told to be over.
    """

    def __init__(self, arms: Sequence[str], outcomes: Sequence[str], seed: int = 0) -> None:
        """arms: to switch among. outcomes: drafters that are asked for drafts."""
        self.seen: list[RoundReport] = []
        self.ended: list[int] = []
        self._arms = list(arms)
        self._scored = list(outcomes)
        self._random = random.Random(seed)

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        return decision

    def shadow_drafters(self, ticket: int) -> Sequence[str]:
        return [name for name in self._scored if self._random.random() < 0.5]

    def after_round(self, ticket: int, seen: RoundReport) -> str | None:
        self.seen.append(seen)
        right = sum(one.accepted for one in seen.outcomes)
        # two lots where drafts were right, one where they were not
        lots = [self._random.random() for _ in range(1 + (right > 0))]
        return self._random.choice(self._arms) if min(lots) < 0.5 else None

    def observes_round(self, ticket: int) -> bool:
        return True

    def end(self, ticket: int, emitted: int) -> None:
        self.ended.append(ticket)
