"""Records of a round: a drafter's view of a row, drafts and their outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.contracts.requests import SamplingParams


class RowView(Protocol):
    """What a drafter may see of a row: its tokens so far, and how they are sampled."""

    @property
    def id(self) -> int: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def num_prompt(self) -> int:
        """How many of the tokens are the prompt's."""

    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def slot(self) -> int:
        """Its slot in the target's cache."""

    @property
    def num_cached(self) -> int:
        """Leading positions of the slot that hold the row: between rounds, all tokens but the last."""


@dataclass(slots=True)
class Drafts:
    """The proposals of one drafter for R rows, as arrays.

    probs: the warped distribution that each token was drawn from; None if the tokens are a
    deterministic function of the text, or were drawn with the verifier's noise. parents: the index of
    each token's parent in a tree, below its own, -1 for the row's last token; None if all drafts are
    chains. A tree has no `probs`: the verifier samples from the target's distribution at each node.
    Entries from a row's length on are padding.
    """

    tokens: Tensor  # [R, K] int64
    lengths: Sequence[int]  # R
    probs: Tensor | None = None  # [R, K, V]
    parents: Tensor | None = None  # [R, K] int64


@dataclass(frozen=True, slots=True)
class RoundStats:
    """One round of one row. `accepted` counts draft tokens that were emitted."""

    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """The agreement of a draft, of the arm in use or a shadow draft, with the text so far.

    drafted: tokens of the draft, at most `allowed`. accepted: leading tokens that equal the text.
    ended: the token after them differs from the text, or the draft stopped below `allowed`; otherwise
    the text is too short to tell, or no more tokens were allowed. known: accepted tokens in an earlier
    outcome of the same draft.
    """

    drafter: str
    drafted: int
    allowed: int
    accepted: int
    ended: bool
    known: int = 0

    @classmethod
    def of(
        cls, drafter: str, drafted: int, allowed: int, right: int, visible: int, known: int = 0
    ) -> DraftOutcome:
        """Return the outcome of a draft. right: leading tokens that equal the `visible` tokens of text
        written since the draft.
        """
        ended = right < min(drafted, visible) or right == drafted < allowed
        return cls(drafter, drafted, allowed, right, ended, known)

    @property
    def is_final(self) -> bool:
        """Whether later text cannot change the outcome."""
        return self.ended or self.accepted == self.drafted


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round of a controlled row, after its commit.

    context: tokens in the target's cache before the round. rows: in the batch. room: tokens that may
    still be emitted. The seconds are the row's share: of starting its drafter since the last round, of
    drafting, of the rest, and of shadow drafts.
    """

    arm: str
    stats: RoundStats
    emitted: int
    context: int
    rows: int
    room: int
    outcomes: Sequence[DraftOutcome]
    start_seconds: float
    draft_seconds: float
    other_seconds: float
    shadow_seconds: float = 0.0
