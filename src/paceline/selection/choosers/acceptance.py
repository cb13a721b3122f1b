"""A chooser that predicts each arm's outcomes from a few kinds of prompt; priced live.

Training finds the kinds and the arms' outcomes on each. A gate gives each kind a share, and the
prediction is the mean of the kinds' outcomes with these shares. So for any prompt it stays within
the range seen in training. A prompt unlike all of those gets the average of the training prompts: what
the gate says of it would be a guess. The kinds are no task labels: only the arms' outcomes define them.

Symbols: N prompts, F features, Z components, M kinds, E gates of an ensemble, A arms, C cascades among
them, O = 3 A + 2 C + 1 outcomes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paceline.selection.choosers.base import PortableChooser, Situation, Work, softmax
from paceline.selection.choosers.reduction import Reduction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.selection.choosers.base import Arrays, Facts

_ARRAYS = ("gates", "biases", "kinds", "low", "high", "average", "composed")


class AcceptanceChooser(PortableChooser):
    """A chooser of the arm with the best priced outcomes.

    outcomes = mean over E of softmax(components @ gate + bias) @ kinds, clipped to a range.

    The outcomes are rounds, drafted tokens and rounds without a draft, per token and arm; calls of a
    model and their tokens, per token and cascade; and the logarithm of the number of tokens after the
    first.
    """

    kind: ClassVar[str] = "acceptance"

    def __init__(
        self,
        arms: Sequence[str],
        reduction: Reduction,  # F to Z
        gates: np.ndarray,  # [E, Z, M]
        biases: np.ndarray,  # [E, M]
        kinds: np.ndarray,  # [E, M, O]
        low: np.ndarray,  # [O] the smallest in training
        high: np.ndarray,  # [O] the largest
        average: np.ndarray,  # [O] over the training prompts
        composed: np.ndarray,  # [C] int64, places of the cascades
    ) -> None:
        self.arms = tuple(arms)
        self.reduction = reduction
        self.gates, self.biases, self.kinds = gates, biases, kinds
        self.low, self.high = low, high
        self.average, self.composed = average, composed
        E, Z, M = gates.shape
        O = num_outcomes(self.arms, composed)  # noqa: E741
        C = len(composed)
        expected = ((E, reduction.num_components, M), (E, M), (E, M, O), (O,), (O,), (O,), (C,))
        found = tuple(getattr(self, name).shape for name in _ARRAYS)
        if found != expected:
            raise ValueError(f"arrays {found} where {expected} are expected")
        # all gates in one product
        self._gate = np.ascontiguousarray(gates.transpose(1, 0, 2).reshape(Z, E * M))

    def work(self, features: np.ndarray, situation: Situation) -> Work:
        return as_work(self.outcomes(features), situation, len(self.arms), self.composed)

    def outcomes(self, features: np.ndarray) -> np.ndarray:
        """Return the predicted outcomes, [N, O] float64."""
        E, M = self.biases.shape
        logits = (self.reduction(features) @ self._gate).reshape(-1, E, M) + self.biases
        shares = softmax(logits).reshape(-1, E * M) / E
        mixed = np.clip(shares @ self.kinds.reshape(E * M, -1), self.low, self.high)
        familiar = self.reduction.familiarity(features)[:, None]
        return np.asarray(familiar * mixed + (1.0 - familiar) * self.average)

    def arrays(self) -> dict[str, np.ndarray]:
        return self.reduction.arrays() | {name: getattr(self, name) for name in _ARRAYS}

    @classmethod
    def merged(cls, choosers: Sequence[AcceptanceChooser]) -> AcceptanceChooser:
        """Average several trainings on the same prompts: one ensemble of all gates."""
        first = choosers[0]
        gates, biases, kinds = (
            np.concatenate([getattr(chooser, name) for chooser in choosers])
            for name in ("gates", "biases", "kinds")
        )
        ends = first.low, first.high, first.average, first.composed
        return cls(first.arms, first.reduction, gates, biases, kinds, *ends)

    @classmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> AcceptanceChooser:
        return cls(arms, Reduction.restore(arrays), *(arrays[name] for name in _ARRAYS))


def num_outcomes(arms: Sequence[str], composed: np.ndarray) -> int:
    """Return O. Raises ValueError for a place that is no arm's. composed: [C] places of cascades."""
    if not all(0 <= place < len(arms) for place in composed.tolist()):
        raise ValueError("a cascade's place is not among the arms")
    return 3 * len(arms) + 2 * len(composed) + 1


def as_work(
    outcomes: np.ndarray, situation: Situation, num_arms: int, composed: np.ndarray
) -> Work:
    """Return outcomes [N, O] by name. The expected length is at most the situation's limit.

    composed: [C] places of cascades among the arms.
    """
    A, C = num_arms, len(composed)
    num_tokens = np.exp(outcomes[:, -1])
    if situation.limits is not None:
        num_tokens = np.minimum(num_tokens, np.maximum(situation.limits - 1, 1))
    rounds, drafted, empty = outcomes[:, :A], outcomes[:, A : 2 * A], outcomes[:, 2 * A : 3 * A]
    calls, proposed = np.maximum(rounds - empty, 0.0), drafted.copy()
    calls[:, composed] = outcomes[:, 3 * A : 3 * A + C]
    proposed[:, composed] = outcomes[:, 3 * A + C : 3 * A + 2 * C]
    return Work(rounds, drafted, empty, calls, proposed, num_tokens)
