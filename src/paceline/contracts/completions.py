"""Records of an answered request: the choice of its arm, its seconds and its completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from paceline.contracts.requests import split_arm

if TYPE_CHECKING:
    import numpy as np

    from paceline.contracts.rounds import RoundStats

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Decision:
    """The arm of a request and the probability with which it was chosen."""

    arm: str  # a drafter, or a drafter at a draft length; see `split_arm`
    propensity: float = 1.0
    scores: dict[str, float] = field(default_factory=dict)
    policy: str = "fixed"
    features: np.ndarray | None = field(
        default=None, compare=False, repr=False
    )  # [F] of the policy
    seconds_per_token: dict[str, float] = field(default_factory=dict)  # predicted, per arm
    seconds_in_rounds: dict[str, float] = field(default_factory=dict)  # without prefill and start

    @property
    def drafter(self) -> str:
        return split_arm(self.arm)[0]

    @property
    def num_draft_tokens(self) -> int | None:
        """Maximum number of tokens of a draft; None leaves it to the drafter."""
        return split_arm(self.arm)[1]


@dataclass(slots=True)
class Seconds:
    """Wall-clock seconds of a request by part; a batch's shared work is divided among its rows.

    `queue` is the time before admission, which is not in the total.
    """

    queue: float = 0.0
    prefill: float = 0.0
    choose: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    commit: float = 0.0

    @property
    def total(self) -> float:
        return self.prefill + self.choose + self.draft + self.verify + self.commit


@dataclass(slots=True)
class Completion:
    """The answer to a request, with its rounds and seconds.

    `text` ends before a stop string; `token_ids` includes the token that completed the stop.
    `seconds_total` is wall-clock time from admission to the last token; `seconds` has its parts.
    """

    request_id: str
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    drafter: str
    decision: Decision
    rounds: list[RoundStats]
    seconds: Seconds
    seconds_total: float
    num_prompt_tokens: int
    seed: int
    error: str | None = None  # the reason if finish_reason is "error"
    logprobs: list[float] | None = None  # of the emitted tokens under the target, if requested
    # (tokens emitted before, arm) of every change of arm after the decision
    switches: list[tuple[int, str]] = field(default_factory=list)

    @property
    def block_efficiency(self) -> float:
        """tau: emitted tokens per target forward, without the prefill's first token."""
        return (len(self.token_ids) - 1) / len(self.rounds) if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds_total if self.seconds_total > 0 else 0.0
