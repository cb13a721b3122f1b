"""A row: one request in flight, with its tokens, its place in the target's cache and its counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.contracts import NONE, Decision, RoundStats, Seconds

if TYPE_CHECKING:
    import numpy as np

    from paceline.contracts import FinishReason, Request, SamplingParams
    from paceline.drafting.base import Drafter


@dataclass(slots=True, eq=False)
class Row:
    """Its tokens are prompt and output; all but the last are in the target's cache between rounds.

    `max_total` bounds the tokens by max_new_tokens and by the context, whichever is nearer.
    """

    id: int
    request: Request
    slot: int
    max_total: int
    admitted_at: float
    tokens: list[int]
    drafter: Drafter
    decision: Decision = field(default_factory=lambda: Decision(arm=NONE))
    rounds: list[RoundStats] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    finish_reason: FinishReason | None = None
    finished_at: float = 0.0
    hidden_sum: np.ndarray | None = None  # [D] float32, over the prompt
    hidden_last: np.ndarray | None = None  # [D] float32

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def draft_limit(self) -> int:
        """Tokens worth drafting: a round emits one more than it accepts."""
        return self.max_total - len(self.tokens) - 1
