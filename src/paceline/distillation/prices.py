"""Prices: the seconds of a target's forwards and of a drafter's proposals on this machine.

They are of one request at one context. Made from a cost table: an existing one, or one that was
measured for a new student (`verbs.distillation.measure_prices`). This module knows no model and no
clock. Symbols: K the longest draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.costs.pricing import draft_seconds
from paceline.costs.table import ENGINE, FORWARD, ROUND, TARGET
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.costs.table import CostTable

CONTEXT: Final = 128
"""Tokens cached before a round, unless a caller names another number."""


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """Seconds of a round's parts by k drafted tokens, for k = 0 to K.

    forwards: of the target, of 1 + k tokens, judging included. proposals: of the drafter, of k tokens,
    with what they add to the forward after them. engine: the host's other work per round.
    """

    forwards: NDArray[np.float64]  # [K + 1]
    proposals: NDArray[np.float64]  # [K + 1]
    engine: float
    context: int

    @classmethod
    def from_table(
        cls, costs: CostTable, arm: str, num_draft_tokens: int, context: int = CONTEXT
    ) -> Prices:
        """Read the prices of a drafter from a cost table, up to a draft length K.

        Raises ArtefactError if the table lacks the drafter, ConfigError if K is below 1.
        """
        if num_draft_tokens < 1:
            raise ConfigError(f"prices are of drafts of 1 token or more; got {num_draft_tokens}")
        lengths, at = np.arange(num_draft_tokens + 1), np.array(context)
        proposals = draft_seconds(costs.seconds, arm, lengths, at)
        proposals[0] = 0.0  # a plain round asks no drafter
        return cls(
            forwards=costs.seconds(TARGET, FORWARD, 1 + lengths, at),
            proposals=proposals,
            engine=costs.seconds(ENGINE, ROUND, 0),
            context=context,
        )

    @property
    def longest(self) -> int:
        """The longest draft, K."""
        return len(self.forwards) - 1

    @property
    def plain(self) -> float:
        """Seconds of a round of the target alone."""
        return float(self.forwards[0]) + self.engine

    @property
    def round_costs(self) -> NDArray[np.float64]:
        """The seconds of a round with k drafted tokens in units of a plain one [K + 1]; 1 at k = 0."""
        costs: NDArray[np.float64] = (self.forwards + self.proposals + self.engine) / self.plain
        return costs

    @property
    def step_share(self) -> float:
        """Measured c: seconds per drafted token over those of the target's forward of one token.

        The longest proposal counts, in which the work once per proposal weighs least.
        """
        return float(self.proposals[-1] / self.longest / self.forwards[0])
