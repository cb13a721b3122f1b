"""Adaptation within a request: the arm to continue with, judged by the request's own text.

The algorithm is Hedge (Freund and Schapire, 1997) with the policy's prediction as its prior, in the
manner of HedgeSpec (arXiv 2510.20064): the verified text judges every drafter that drafted it, also
drafters whose arm was not in use. A draft longer than the text so far is known only in part, and a
shortened draft says nothing about the tokens that it left out. Therefore depths are counted instead
of drafts: how often a draft that was right up to a depth was right at the next one (the product-limit
estimate of Kaplan and Meier). These counts price every draft length of a drafter at once.

The loss of an arm is its seconds per token over those of plain decoding at the same place. The arm in
use is replaced only by an arm with clearly more weight. This module knows no engine and no drafter; an
arm is a name and a draft length. Symbols: N arms, D drafters, K the longest draft, n judged drafts.
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
"""Weight of the policy's prediction in observed rounds; it fades as they do."""

MEMORY: Final = 0.97
"""Weight that a judged draft keeps at the next draft of its drafter, because texts change."""

MARGIN: Final = log(1.5)
"""Logarithm of the weights' ratio above which the arm in use is left."""

# rows of the counts by depth
_ALLOWED, _DRAFTED, _TRIED, _RIGHT = range(4)


@dataclass(frozen=True, slots=True)
class Arm:
    """A drafter at a draft length; `none` has length 0."""

    name: str
    drafter: str
    num_draft_tokens: int


class ArmTable:
    """All arms of a process, with the indices of arms and drafters in arrays."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self.arms = tuple(arms)
        self.index = {arm.name: i for i, arm in enumerate(arms)}
        self.lengths: dict[str, int] = {}  # drafter -> its longest draft
        self._indices_of: dict[str, list[int]] = {}
        for i, arm in enumerate(arms):
            self._indices_of.setdefault(arm.drafter, []).append(i)
            self.lengths[arm.drafter] = max(arm.num_draft_tokens, self.lengths.get(arm.drafter, 0))
        self.drafter_index = {name: d for d, name in enumerate(self.lengths)}
        self.drafter_of = np.array([self.drafter_index[arm.drafter] for arm in arms])  # [N]
        self.length_of = np.array([arm.num_draft_tokens for arm in arms])  # [N]
        self.longest = max(self.lengths.values())  # K

    def indices_of(self, drafter: str) -> list[int]:
        """Return the indices of a drafter's arms."""
        return self._indices_of[drafter]

    def __getitem__(self, name: str) -> Arm:
        return self.arms[self.index[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.index

    def __len__(self) -> int:
        return len(self.arms)


class Hedge:
    """The expected losses of the arms in one request, from the prior and the text so far."""

    def __init__(
        self,
        arms: ArmTable,
        prior: NDArray[np.float64],
        prices: RoundPrices,
        context: int,
        rows: int,
    ) -> None:
        """prior: [N] predicted seconds per token over those of plain decoding."""
        # an arm has a length; order of the rules for a draft's length: drafting.draft_length
        self.arms = arms
        self._num_tokens = 0.0  # emitted, faded as the drafts are
        self._prices = prices
        self._num_drafts = np.zeros(len(arms.lengths))  # [D], n
        self._prior_rounds = np.full(len(arms.lengths), PRIOR_ROUNDS)  # [D]
        self._counts = np.zeros((len(arms.lengths), 4, arms.longest + 1))  # [D, 4, K+1]
        self._curves = np.zeros((len(arms.lengths), arms.longest + 1))  # [D, K+1], plain rounds
        self._priced_at = (-1, -1)
        self._price(context, rows)
        # predicted tokens per round, which do not change with prices
        self._predicted = self._curves[arms.drafter_of, arms.length_of] / prior  # [N]

    def _price(self, context: int, rows: int) -> None:
        priced_at = (context // self._prices.bucket, rows)
        if priced_at == self._priced_at:
            return
        self._priced_at = priced_at
        plain = self._prices.rounds(NONE, context, rows)[0]
        for name, d in self.arms.drafter_index.items():
            curve = self._prices.rounds(name, context, rows)
            self._curves[d, : len(curve)] = curve / plain

    def observe(self, outcomes: Sequence[DraftOutcome], emitted: int) -> None:
        """Count a round: the judged drafts of any drafters, and the number of emitted tokens."""
        for outcome in outcomes:
            d = self.arms.drafter_index[outcome.drafter]
            _count(
                self._counts[d],
                outcome.drafted,
                outcome.allowed,
                outcome.known,
                outcome.accepted,
                int(outcome.ended),
            )
            if outcome.known == 0:
                self._num_drafts[d] = self._num_drafts[d] * MEMORY + 1.0
                self._prior_rounds[d] *= MEMORY
        self._num_tokens = self._num_tokens * MEMORY + emitted

    def num_drafts(self, drafter: str) -> float:
        """Return the decayed number of a drafter's judged drafts."""
        return float(self._num_drafts[self.arms.drafter_index[drafter]])

    def losses(self, context: int, rows: int) -> NDArray[np.float64]:
        """Return the expected seconds per token [N] over those of plain decoding, at this context."""
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

    def prior_losses(self) -> NDArray[np.float64]:
        """Return the losses [N] by the prior alone, at the context of the last `losses`."""
        curves: NDArray[np.float64] = self._curves[self.arms.drafter_of, self.arms.length_of]
        return np.asarray(curves / self._predicted)

    def best(
        self, current: str, losses: NDArray[np.float64], excluded: Collection[str] = ()
    ) -> str:
        """Return the arm with the largest weight if it clearly exceeds the current arm's weight,
        otherwise the current arm.

        The logarithm of Hedge's weight is minus the loss over the text so far, times the anytime
        rate sqrt(8 ln N / t) after t tokens; only differences matter.
        """
        index = self.arms.index
        if excluded:
            losses = losses.copy()
            losses[[index[name] for name in excluded]] = np.inf
        leader = int(losses.argmin())
        t = PRIOR_ROUNDS + self._num_tokens
        log_ratio = sqrt(8.0 * log(max(2, len(self.arms))) * t) * (
            losses[index[current]] - losses[leader]
        )
        return self.arms.arms[leader].name if log_ratio > MARGIN else current


@compiled
def _count(
    counts: np.ndarray, drafted: int, allowed: int, known: int, accepted: int, ended: int
) -> None:
    """Add the newly known depths of a draft. counts: [4, K+1] of its drafter."""
    if known == 0:
        counts *= MEMORY
        counts[_ALLOWED, :allowed] += 1.0
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
    """Return seconds over tokens [N]: those predicted for the prior's rounds plus those observed.

    An unobserved depth is taken to be like the depths before it on average.
    """
    losses = np.ones(len(predicted))
    for i in range(len(predicted)):
        d, k, n = drafter_of[i], length_of[i], num_drafts[drafter_of[i]]
        if k == 0:
            continue
        curve, count = curves[d], counts[d]
        seconds, emitted, survives = curve[0], 1.0, 1.0
        tried = right = allowed = drafted = 0.0
        for j in range(k if n > 0 else 0):
            tried += count[_TRIED, j]
            right += count[_RIGHT, j]
            allowed += count[_ALLOWED, j]
            drafted += count[_DRAFTED, j]
            if count[_TRIED, j] > 1e-9:
                survives *= count[_RIGHT, j] / count[_TRIED, j]
            else:
                survives *= right / tried if tried > 0 else 1.0
            emitted += survives
            if count[_ALLOWED, j] > 1e-9:
                share = count[_DRAFTED, j] / count[_ALLOWED, j]
            else:
                share = drafted / allowed if allowed > 0 else 1.0
            # linear in the shares: a depth adds its step of the curve times the share that drafts it
            seconds += share * (curve[j + 1] - curve[j])
        prior = prior_rounds[d]
        losses[i] = (prior * curve[k] + n * seconds) / (prior * predicted[i] + n * emitted)
    return losses
