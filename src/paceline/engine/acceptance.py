"""The acceptance of one drafter's tokens in one row, learned round by round while the row is decoded.

This module knows no prices. Symbol: a, the probability that a draft's next token is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.drafting.contract import Draft
    from paceline.verification import Verdict

# acceptance before the first draft, and the number of tokens that it counts as
_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0
_MEMORY: Final = (
    0.98  # weight of earlier rounds, per round, so that a failed drafter is tried again
)
_STEPS: Final = 64  # of a, so that drafts of one shape often share their chances


@lru_cache(maxsize=4096)
def _chances(steps: int, parents: tuple[int, ...] | None, length: int) -> list[float]:
    rate = steps / _STEPS
    if parents is None:
        return [rate**k for k in range(1, length + 1)]
    num_children = [0] * (length + 1)  # the last entry is the root's, at index -1
    chances = [1.0] * (length + 1)
    for k, parent in enumerate(parents):
        num_children[parent] += 1
        chances[k] = chances[parent] * rate / num_children[parent]
    return chances[:length]


@dataclass(slots=True)
class Acceptance:
    """The share of tokens that were right, as far as they were tried."""

    right: float = _PRIOR * _PRIOR_WEIGHT
    tried: float = _PRIOR_WEIGHT

    def chances(self, parents: Sequence[int] | None, length: int) -> list[float]:
        """Return the probability that each token of a draft is accepted, its parents included.

        A k-th child of a token is accepted with probability a/k. parents: as in `Drafts`. Do not write
        to the list.
        """
        shape = None if parents is None else tuple(parents)
        return _chances(round(self.right / self.tried * _STEPS), shape, length)

    def learn(self, draft: Draft, verified: Draft, verdict: Verdict) -> None:
        """Learn from a judged draft. draft: as proposed. verified: the tokens of it that were judged."""
        right, num_verified = len(verdict.path), len(verified.tokens)
        if draft.probs is not None:  # the target's token equals a drawn one too rarely to try it by
            wrong = right < num_verified
        elif draft.parents is None:
            wrong = right < len(draft.tokens)
            if wrong and draft.tokens[right] == verdict.next_token:  # it was cut
                right, wrong = right + 1, False
        else:
            last = verdict.path[-1] if right else -1
            wrong = verified.parents is not None and last in verified.parents
        forgotten = 1.0 - _MEMORY
        self.right += forgotten * (_PRIOR * _PRIOR_WEIGHT - self.right) + right
        self.tried += forgotten * (_PRIOR_WEIGHT - self.tried) + right + wrong
