"""A row: one request in flight, with its tokens, its place in the target's cache and its counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.contracts import NONE, Decision, RoundStats, Seconds, split_arm
from paceline.errors import describe

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from paceline.contracts import Context, FinishReason, Request, SamplingParams
    from paceline.drafting.base import Drafter
    from paceline.engine.endings import StopFinder


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
    arm: str = NONE  # in use; the decision says what was chosen
    num_prefilled: int = 0  # leading prompt tokens in the target's cache
    prepared: bool = False  # whether the drafter has its own prefill behind it
    num_draft_tokens: int = 0  # of its drafter, read in the last round
    # drafters that are started and not in use, and whether they are prepared
    kept: dict[str, bool] = field(default_factory=dict)
    barred: set[str] = field(default_factory=set)  # drafters that failed or found no memory
    pieces: dict[str, int] = field(default_factory=dict)  # calls of `prepare` by drafter
    failures: dict[str, str] = field(default_factory=dict)  # drafter -> its first error here
    switches: list[tuple[int, str]] = field(default_factory=list)  # (tokens emitted, arm)
    decision: Decision = field(default_factory=lambda: Decision(arm=NONE))
    context: Context | None = None  # what the policy saw, where it was asked
    rounds: list[RoundStats] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    finish_reason: FinishReason | None = None
    error: str | None = None
    cause: BaseException | None = None  # the exception behind the error
    finished_at: float = 0.0
    num_reported: int = 0  # output tokens that left as progress
    hidden: Tensor | None = None  # [D] before the last token, where the drafter needs it
    hidden_sum: np.ndarray | None = None  # [D] float32, over the prefilled prompt
    hidden_last: np.ndarray | None = None  # [D] float32
    block_sums: list[np.ndarray] = field(default_factory=list)  # hidden_sum at each block's end
    logprobs: list[float] = field(default_factory=list)
    stop_finder: StopFinder | None = None  # where it has stop strings

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
    def is_prefilled(self) -> bool:
        return self.num_prefilled == self.num_prompt

    @property
    def draft_limit(self) -> int:
        """How deep a draft is worth being: a round emits one token more than it accepts."""
        return self.limit_at(len(self.tokens))

    def limit_at(self, num_tokens: int, any_length: bool = False) -> int:
        """The same when the row had so many tokens; with `any_length` whatever the arm's own limit."""
        # order of the rules for a draft's length: drafting.draft_length
        room = self.max_total - num_tokens - 1
        most = None if any_length else split_arm(self.arm)[1]
        return room if most is None else min(room, most)

    @property
    def drafter_name(self) -> str:
        """The engine's name of the drafter in use, which may differ from the drafter's own `name`."""
        return split_arm(self.arm)[0]

    def fail(self, reason: str, error: BaseException | None = None) -> None:
        """End this row with an error; other rows go on. The first error is kept."""
        if self.error is None:
            self.error = reason if error is None else f"{reason}: {describe(error)}"
            self.cause = error
        self.finish_reason = "error"

    def fail_by(self, drafter: str, error: BaseException) -> None:
        """Fail because of a drafter."""
        self.note_failure(drafter, error)
        self.fail(f"drafter '{drafter}'", error)

    def note_failure(self, drafter: str, error: BaseException) -> None:
        """Record a drafter's failure and use it no more. The row goes on."""
        self.barred.add(drafter)
        self.failures.setdefault(drafter, describe(error))

    def keeps_text(self, num_tokens: int, last: int) -> bool:
        """Return whether a drafter left the tokens unchanged; restore the length and the last token."""
        tokens = self.tokens
        if len(tokens) == num_tokens and tokens[-1] == last:
            return True
        del tokens[num_tokens:]
        if len(tokens) == num_tokens:
            tokens[-1] = last
        return False
