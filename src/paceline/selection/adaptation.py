"""Which arm a request should go on with, from what its own text has said of the drafters so far.

Hedge, with the policy's prediction as its prior, after HedgeSpec (arXiv 2510.20064): the text that
was verified judges every drafter that made a draft of it, whichever was in use. What a draft turns
out to be worth comes late and in part: a draft longer than the text is known only as far as that
goes, and one cut short says nothing of what would have come behind. So depths are counted, not
drafts: how often a draft that was right so far was right once more (the product-limit estimate of
Kaplan and Meier), and from them every length of a drafter is priced at once.

The loss of an arm is its seconds per token over those of plain decoding at the same place, and the
arm in use is left only for one that weighs clearly more. Knows no engine and no drafter; arms are
names and lengths. Symbols: N arms, D drafters, K the longest draft, n drafts that were judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.compiled import compiled
from paceline.contracts import NONE

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from paceline.contracts import DraftOutcome
    from paceline.selection.round_prices import RoundPrices

PRIOR_ROUNDS: Final = 6.0
"""What the policy's prediction weighs, in rounds seen; it fades as they do."""

MEMORY: Final = 0.97
"""What a judged draft still weighs at the next one of its drafter: texts change on the way."""

MARGIN: Final = log(1.5)
"""An arm is left for one that weighs at least half as much again."""

# what is counted at each depth of a drafter's drafts
_OFFERED, _DRAFTED, _TRIED, _RIGHT = range(4)


@dataclass(frozen=True, slots=True)
class Arm:
    """A drafter at a draft length; `none` has length 0."""

    name: str
    drafter: str
    num_draft_tokens: int


class Arms:
    """All arms there are, with the places of arms and drafters in arrays; made once a process."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self.all = tuple(arms)
        self.place = {arm.name: i for i, arm in enumerate(arms)}
        self.lengths: dict[str, int] = {}  # drafter -> its longest
        self._of: dict[str, list[int]] = {}
        for i, arm in enumerate(arms):
            self._of.setdefault(arm.drafter, []).append(i)
            self.lengths[arm.drafter] = max(arm.num_draft_tokens, self.lengths.get(arm.drafter, 0))
        self.drafter_place = {name: d for d, name in enumerate(self.lengths)}
        self.drafter_of = np.array([self.drafter_place[arm.drafter] for arm in arms])  # [N]
        self.length_of = np.array([arm.num_draft_tokens for arm in arms])  # [N]
        self.longest = max(self.lengths.values())  # K

    def of(self, drafter: str) -> list[int]:
        """Places of a drafter's arms."""
        return self._of[drafter]

    def __getitem__(self, name: str) -> Arm:
        return self.all[self.place[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.place

    def __len__(self) -> int:
        return len(self.all)


class Hedge:
    """The arms of one request and what they are believed to cost, from prior and text."""

    def __init__(
        self,
        arms: Arms,
        prior: NDArray[np.float64],
        prices: RoundPrices,
        context: int,
        rows: int,
    ) -> None:
        """prior: [N] predicted seconds per token over plain decoding's."""
        # an arm has a length; order of the rules for a draft's length: drafting.draft_length
        self.arms = arms
        self.num_tokens = 0.0  # emitted, faded as the drafts are
        self._prices = prices
        self._num_drafts = np.zeros(len(arms.lengths))  # [D], n
        self._prior_rounds = np.full(len(arms.lengths), PRIOR_ROUNDS)  # [D]
        self._counts = np.zeros((len(arms.lengths), 4, arms.longest + 1))  # [D, 4, K+1]
        self._curves = np.zeros((len(arms.lengths), arms.longest + 1))  # [D, K+1] of plain rounds
        self._priced_at = (-1, -1)
        self._price(context, rows)
        # the tokens a round is predicted to emit: these stay when prices change
        self._predicted = self._curves[arms.drafter_of, arms.length_of] / prior  # [N]

    def _price(self, context: int, rows: int) -> None:
        place = (context // self._prices.bucket, rows)
        if place == self._priced_at:
            return
        self._priced_at = place
        plain = self._prices.rounds(NONE, context, rows)[0]
        for name, d in self.arms.drafter_place.items():
            curve = self._prices.rounds(name, context, rows)
            self._curves[d, : len(curve)] = curve / plain

    def observe(self, outcomes: Sequence[DraftOutcome], emitted: int) -> None:
        """What a round brought: judged drafts of any drafters, and how much text."""
        for one in outcomes:
            d = self.arms.drafter_place[one.drafter]
            _count(
                self._counts[d], one.drafted, one.allowed, one.known, one.accepted, int(one.ended)
            )
            if one.known == 0:
                self._num_drafts[d] = self._num_drafts[d] * MEMORY + 1.0
                self._prior_rounds[d] *= MEMORY
        self.num_tokens = self.num_tokens * MEMORY + emitted

    def num_drafts(self, drafter: str) -> float:
        """How much has been seen of a drafter, in drafts."""
        return float(self._num_drafts[self.arms.drafter_place[drafter]])

    def losses(self, context: int, rows: int) -> NDArray[np.float64]:
        """[N] believed seconds per token over plain decoding's, at this place and load."""
        self._price(context, rows)
        losses: NDArray[np.float64] = _losses(
            self._counts,
            self._num_drafts,
            self._prior_rounds,
            self._curves,
            self._predicted,
            self.arms.drafter_of,
            self.arms.length_of,
        )
        return losses

    def expected(self) -> NDArray[np.float64]:
        """[N] what the prior alone says, where `losses` was last asked."""
        curves: NDArray[np.float64] = self._curves[self.arms.drafter_of, self.arms.length_of]
        return np.asarray(curves / self._predicted)

    def best(self, current: str, losses: NDArray[np.float64], barred: Collection[str] = ()) -> str:
        """The arm with most weight, if it clearly outweighs the current one; else the current one.

        The logarithm of Hedge's weight is minus the loss over the text so far, at the anytime rate
        sqrt(8 ln N / t) of t tokens; only differences matter.
        """
        place = self.arms.place
        if barred:
            losses = losses.copy()
            losses[[place[name] for name in barred]] = np.inf
        leader = int(losses.argmin())
        t = PRIOR_ROUNDS + self.num_tokens
        outweighs = sqrt(8.0 * log(max(2, len(self.arms))) * t) * (
            losses[place[current]] - losses[leader]
        )
        return self.arms.all[leader].name if outweighs > MARGIN else current


@compiled
def _count(
    counts: np.ndarray, drafted: int, allowed: int, known: int, accepted: int, ended: int
) -> None:
    """Count what has become known of a draft. counts: [4, K+1] of its drafter."""
    if known == 0:
        counts *= MEMORY
        counts[_OFFERED, :allowed] += 1.0
        counts[_DRAFTED, :drafted] += 1.0
    counts[_TRIED, known : accepted + ended] += 1.0
    counts[_RIGHT, known:accepted] += 1.0


@compiled
def _losses(
    counts: np.ndarray,
    num_drafts: np.ndarray,
    prior_rounds: np.ndarray,
    curves: np.ndarray,
    predicted: np.ndarray,
    drafter_of: np.ndarray,
    length_of: np.ndarray,
) -> np.ndarray:
    """Seconds over tokens of each arm: what was predicted of the prior's rounds, and what was seen.

    A depth that nothing is known of is taken to be as the depths above it on average.
    """
    losses = np.ones(len(predicted))
    for i in range(len(predicted)):
        d, k, n = drafter_of[i], length_of[i], num_drafts[drafter_of[i]]
        if k == 0:
            continue
        curve, of = curves[d], counts[d]
        seconds, emitted, survives = curve[0], 1.0, 1.0
        tried = right = offered = drafted = 0.0
        for j in range(k if n > 0 else 0):
            tried += of[_TRIED, j]
            right += of[_RIGHT, j]
            offered += of[_OFFERED, j]
            drafted += of[_DRAFTED, j]
            if of[_TRIED, j] > 1e-9:
                survives *= of[_RIGHT, j] / of[_TRIED, j]
            else:
                survives *= right / tried if tried > 0 else 1.0
            emitted += survives
            if of[_OFFERED, j] > 1e-9:
                share = of[_DRAFTED, j] / of[_OFFERED, j]
            else:
                share = drafted / offered if offered > 0 else 1.0
            # linear in the shares: a depth adds its step of the curve as often as it is drafted
            seconds += share * (curve[j + 1] - curve[j])
        prior = prior_rounds[d]
        losses[i] = (prior * curve[k] + n * seconds) / (prior * predicted[i] + n * emitted)
    return losses
