"""Which arm a request should go on with, from what its own text has said of the drafters so far.

Hedge, with the policy's prediction as its prior, after HedgeSpec (arXiv 2510.20064): the text that
was verified judges every drafter that made a draft of it, whichever was in use. What a draft turns
out to be worth comes late and in part: a draft longer than the text is known only as far as that
goes, and one cut short says nothing of what would have come behind. So depths are counted, not
drafts: how often a draft that was right so far was right once more (the product-limit estimate of
Kaplan and Meier), and from them every length of a drafter is priced at once.

The loss of an arm is its seconds per token over those of plain decoding at the same place, and the
arm in use is left only for one that weighs clearly more. Knows no engine and no drafter; arms are
names and lengths. Symbols: N arms, K a drafter's full length, n drafts that were judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from paceline.contracts import Scored
    from paceline.selection.round_prices import RoundPrices

PRIOR_ROUNDS: Final = 6.0
"""What the policy's prediction weighs, in rounds seen."""

MEMORY: Final = 0.97
"""What a judged draft still weighs at the next one of its drafter: texts change on the way."""

MARGIN: Final = log(2)
"""An arm is left for one that weighs at least twice as much."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A drafter at a draft length; `none` has length 0."""

    name: str
    drafter: str
    num_draft_tokens: int


class Acceptance:
    """What one request's text has said of one drafter, by depth of its drafts."""

    def __init__(self, num_draft_tokens: int) -> None:
        """num_draft_tokens: K."""
        self.num_drafts = 0.0  # n, faded
        self._offered = np.zeros(num_draft_tokens)  # drafts that might have been so long
        self._drafted = np.zeros(num_draft_tokens)  # drafts that were
        self._tried = np.zeros(num_draft_tokens)  # drafts right up to here of which the next is known
        self._right = np.zeros(num_draft_tokens)  # those that were right here, too

    def add(self, scored: Scored) -> None:
        """Count what has become known of a draft."""
        if scored.known == 0:
            for counts in (self._offered, self._drafted, self._tried, self._right):
                counts *= MEMORY
            self.num_drafts = self.num_drafts * MEMORY + 1.0
            self._offered[: scored.allowed] += 1.0
            self._drafted[: scored.drafted] += 1.0
        self._tried[scored.known : scored.accepted + scored.ended] += 1.0
        self._right[scored.known : scored.accepted] += 1.0

    def drafted_shares(self) -> NDArray[np.float64]:
        """[K] how often a draft is at least so long; never offered: as often as a token shorter."""
        return _shares(self._drafted, self._offered)

    def accepted(self) -> NDArray[np.float64]:
        """[K] expected accepted tokens of each length."""
        total: NDArray[np.float64] = np.cumprod(_shares(self._right, self._tried)).cumsum()
        return total


def _shares(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """part / whole by depth; where nothing is known the share of all depths above."""
    known = whole > 1e-9
    if known.all():
        return part / whole
    # the first depth is known as soon as anything is, and depths become known in order
    num_known = int(known.sum())
    shares = np.empty(len(whole))
    np.divide(part[:num_known], whole[:num_known], out=shares[:num_known])
    shares[num_known:] = part.sum() / whole.sum() if num_known else 1.0
    return shares


class Hedge:
    """The arms of one request and what they are believed to cost, from prior and text."""

    def __init__(
        self,
        arms: Sequence[Arm],
        prior: Mapping[str, float],
        prices: RoundPrices,
        context: int,
        rows: int,
    ) -> None:
        """prior: arm -> predicted seconds per token over plain decoding's; `none` must be an arm."""
        self.arms = tuple(arms)
        self._prices = prices
        self._index = {arm.name: i for i, arm in enumerate(self.arms)}
        self._plain = self._index[NONE]
        self._of: dict[str, list[int]] = {}
        for i, arm in enumerate(self.arms):
            self._of.setdefault(arm.drafter, []).append(i)
        self._acceptance = {
            name: Acceptance(max(self.arms[i].num_draft_tokens for i in members))
            for name, members in self._of.items()
        }
        self.num_tokens = 0.0  # emitted, faded as the drafts are
        plain = prices.rounds(NONE, context, rows)[0]
        # the tokens a round is predicted to emit: these stay when prices change
        self._predicted = {
            arm.name: float(
                prices.rounds(arm.drafter, context, rows)[arm.num_draft_tokens]
                / (plain * prior[arm.name])
            )
            for arm in self.arms
        }

    def observe(self, scored: Sequence[Scored], emitted: int) -> None:
        """What a round brought: judged drafts of any drafters, and how much text."""
        for one in scored:
            self._acceptance[one.drafter].add(one)
        self.num_tokens = self.num_tokens * MEMORY + emitted

    def num_drafts(self, drafter: str) -> float:
        """How much has been seen of a drafter, in drafts."""
        return self._acceptance[drafter].num_drafts

    def losses(self, context: int, rows: int) -> NDArray[np.float64]:
        """[N] believed seconds per token over plain decoding's, at this place and load."""
        found = np.ones(len(self.arms))
        plain = float(self._prices.rounds(NONE, context, rows)[0])
        for drafter, members in self._of.items():
            if drafter == NONE:
                continue
            curve = self._prices.rounds(drafter, context, rows) / plain  # [K+1]
            seen = self._acceptance[drafter]
            n = seen.num_drafts
            if n:
                # linear in the shares: each depth adds its step of the curve as often as it is drafted
                seconds = curve[0] + (seen.drafted_shares() * np.diff(curve)).cumsum()
                accepted = seen.accepted()
            for i in members:
                k = self.arms[i].num_draft_tokens
                spent = PRIOR_ROUNDS * curve[k]
                emitted = PRIOR_ROUNDS * self._predicted[self.arms[i].name]
                if n:
                    spent += n * seconds[k - 1]
                    emitted += n * (1.0 + accepted[k - 1])
                found[i] = spent / emitted
        return found

    def log_weights(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N] Hedge's weights, not normalised, at the anytime rate sqrt(8 ln N / t) over t tokens.

        The cumulated loss of an arm is what the text so far would have taken with it.
        """
        t = PRIOR_ROUNDS + self.num_tokens
        return -sqrt(8.0 * log(max(2, len(self.arms))) * t) * losses

    def best(
        self,
        current: str,
        losses: NDArray[np.float64],
        blocked: frozenset[str] = frozenset(),
    ) -> str:
        """The arm with most weight, if it clearly outweighs the current one; else the current one."""
        weights = self.log_weights(losses)
        for name in blocked:
            weights[self._index[name]] = -np.inf
        leader = int(weights.argmax())
        here = self._index[current]
        if weights[leader] - weights[here] > MARGIN:
            return self.arms[leader].name
        return current

    def index(self, arm: str) -> int:
        return self._index[arm]
