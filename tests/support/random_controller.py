"""A controller with random decisions, to test that no text depends on a controller."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Context, Decision, RoundReport


class RandomController:
    """A controller that switches to a random arm after about two of three rounds.

    Before each round it asks for random shadow drafts. Its decisions depend on the rounds' outcomes, as
    a real controller's do. `seen` has every round, `ended` the tickets of ended requests.
    """

    def __init__(self, arms: Sequence[str], shadow_drafters: Sequence[str], seed: int = 0) -> None:
        """arms: the arms to switch to. shadow_drafters: the drafters of shadow drafts."""
        self.seen: list[RoundReport] = []
        self.ended: list[int] = []
        self._arms = list(arms)
        self._shadow_drafters = list(shadow_drafters)
        self._random = random.Random(seed)

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        return decision

    def shadow_drafters(self, ticket: int) -> Sequence[str]:
        return [name for name in self._shadow_drafters if self._random.random() < 0.5]

    def after_round(self, ticket: int, report: RoundReport) -> str | None:
        self.seen.append(report)
        accepted = sum(outcome.accepted for outcome in report.outcomes)
        # a round with accepted tokens has two chances of a switch, any other round one
        draws = [self._random.random() for _ in range(1 + (accepted > 0))]
        return self._random.choice(self._arms) if min(draws) < 0.5 else None

    def observes_round(self, ticket: int) -> bool:
        return True

    def end(self, ticket: int, emitted: int) -> None:
        self.ended.append(ticket)
