"""A chooser that predicts each arm's outcomes from a few kinds of prompt; priced live.

Training finds the kinds and the arms' outcomes on each. A gate gives each kind a share, and the
prediction is the mean of the kinds' outcomes with these shares. So for any prompt it stays within
the range seen in training. The kinds are no task labels: only the arms' outcomes define them. Symbols: N
prompts, F features, Z components, M kinds, E gates of an ensemble, A arms, O = 3 A + 1
outcomes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paceline.selection.choosers.base import PortableChooser, Situation, Work, softmax
from paceline.selection.choosers.reduction import Reduction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.selection.choosers.base import Arrays, Facts

_ARRAYS = ("gates", "biases", "kinds", "low", "high")


class AcceptanceChooser(PortableChooser):
    """A chooser of the arm with the best priced outcomes.

    outcomes = mean over E of softmax(components @ gate + bias) @ kinds, clipped to a range.

    The outcomes are rounds, drafted tokens and rounds without a draft, per token and arm, and the
    logarithm of the number of tokens after the first.
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
    ) -> None:
        self.arms = tuple(arms)
        self.reduction = reduction
        self.gates, self.biases, self.kinds = gates, biases, kinds
        self.low, self.high = low, high
        E, Z, M = gates.shape
        O = 3 * len(self.arms) + 1  # noqa: E741
        expected = ((E, reduction.num_components, M), (E, M), (E, M, O), (O,), (O,))
        found = tuple(getattr(self, name).shape for name in _ARRAYS)
        if found != expected:
            raise ValueError(f"arrays {found} where {expected} are expected")
        # all gates in one product
        self._gate = np.ascontiguousarray(gates.transpose(1, 0, 2).reshape(Z, E * M))

    def work(self, features: np.ndarray, situation: Situation) -> Work:
        return as_work(self.outcomes(features), situation)

    def outcomes(self, features: np.ndarray) -> np.ndarray:
        """Return the predicted outcomes, [N, O] float64."""
        E, M = self.biases.shape
        logits = (self.reduction(features) @ self._gate).reshape(-1, E, M) + self.biases
        shares = softmax(logits).reshape(-1, E * M) / E
        mixed = shares @ self.kinds.reshape(E * M, -1)
        return np.asarray(np.clip(mixed, self.low, self.high))

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
        return cls(first.arms, first.reduction, gates, biases, kinds, first.low, first.high)

    @classmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> AcceptanceChooser:
        return cls(arms, Reduction.restore(arrays), *(arrays[name] for name in _ARRAYS))


def as_work(outcomes: np.ndarray, situation: Situation) -> Work:
    """Return outcomes [N, 3 A + 1] by name. The expected length is at most the situation's limit."""
    A = outcomes.shape[1] // 3
    num_tokens = np.exp(outcomes[:, -1])
    if situation.limits is not None:
        num_tokens = np.minimum(num_tokens, np.maximum(situation.limits - 1, 1))
    rounds, drafted, empty = outcomes[:, :A], outcomes[:, A : 2 * A], outcomes[:, 2 * A : 3 * A]
    return Work(rounds, drafted, empty, num_tokens)
