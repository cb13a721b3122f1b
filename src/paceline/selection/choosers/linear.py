"""A chooser that predicts each arm's reward linearly from a few components of the features and the load.

Symbols: N prompts, Z components, X = Z + 2 inputs (a one and the load among them), A arms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paceline.selection.choosers.base import Chooser, Situation
from paceline.selection.choosers.reduction import Reduction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.selection.choosers.base import Arrays, Facts


class LinearChooser(Chooser):
    """A ranking by predicted rewards: the reward of an arm = inputs @ its weights."""

    kind: ClassVar[str] = "linear"

    def __init__(self, arms: Sequence[str], reduction: Reduction, weights: np.ndarray) -> None:
        """weights: [X, A] float32."""
        self.arms = tuple(arms)
        self.reduction = reduction
        self.weights = weights
        expected = (reduction.num_components + 2, len(self.arms))
        if weights.shape != expected:
            raise ValueError(f"weights {weights.shape} where {expected} are expected")

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        return np.asarray(linear_inputs(self.reduction(features), situation.rows) @ self.weights)

    def scores(self, preferences: np.ndarray) -> np.ndarray:
        return preferences

    def arrays(self) -> dict[str, np.ndarray]:
        return self.reduction.arrays() | {"weights": self.weights}

    @classmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> LinearChooser:
        return cls(arms, Reduction.restore(arrays), arrays["weights"])


def linear_inputs(components: np.ndarray, rows: int | np.ndarray) -> np.ndarray:
    """Return components [N, Z], the logarithm of the rows in flight and a one, as [N, Z + 2]."""
    load = np.broadcast_to(np.log2(np.maximum(rows, 1)), len(components))[:, None]
    return np.hstack([components, load, np.ones((len(components), 1))]).astype(np.float32)
