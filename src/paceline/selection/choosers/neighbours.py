"""A chooser that predicts each arm's outcomes from the nearest prompts; priced live.

Symbols: N prompts, P points (the prompts learned from), Z components, A arms, O outcomes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paceline.selection.choosers.acceptance import as_work, num_outcomes
from paceline.selection.choosers.base import PortableChooser, Situation, Work
from paceline.selection.choosers.reduction import Reduction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.selection.choosers.base import Arrays, Facts


class NeighboursChooser(PortableChooser):
    """A prediction by the rates of the `num_neighbours` nearest points over all their tokens.

    So points weigh in proportion to their tokens. Outcomes are those of `acceptance`.
    """

    kind: ClassVar[str] = "neighbours"

    def __init__(
        self,
        arms: Sequence[str],
        reduction: Reduction,
        points: np.ndarray,  # [P, Z] float32
        outcomes: np.ndarray,  # [P, O] float32
        num_neighbours: int,
        composed: np.ndarray,  # [C] int64, places of the cascades
    ) -> None:
        self.arms = tuple(arms)
        self.reduction = reduction
        self.points, self.outcomes = points, outcomes
        self.num_neighbours, self.composed = num_neighbours, composed
        P = len(points)
        expected = ((P, reduction.num_components), (P, num_outcomes(self.arms, composed)))
        if (points.shape, outcomes.shape) != expected or not 1 <= num_neighbours <= P:
            raise ValueError(
                f"arrays {points.shape}, {outcomes.shape} where {expected} are expected"
            )
        self._norms = (points**2).sum(axis=1)  # [P]

    def work(self, features: np.ndarray, situation: Situation) -> Work:
        near = self.outcomes[self.nearest(features)].astype(np.float64)  # [N, num_neighbours, O]
        tokens = np.exp(near[:, :, -1:])
        mean = (tokens * near).sum(axis=1) / tokens.sum(axis=1)
        mean[:, -1] = near[:, :, -1].mean(axis=1)
        return as_work(mean, situation, len(self.arms), self.composed)

    def nearest(self, features: np.ndarray) -> np.ndarray:
        """Return the indices of the nearest points, [N, num_neighbours] in no order."""
        # the prompt's own norm does not change the order
        distances = self._norms - 2.0 * (self.reduction(features) @ self.points.T)  # [N, P]
        k = self.num_neighbours
        return np.asarray(np.argpartition(distances, k - 1, axis=1)[:, :k])

    def arrays(self) -> dict[str, np.ndarray]:
        own = {"points": self.points, "outcomes": self.outcomes, "composed": self.composed}
        return self.reduction.arrays() | own

    def facts(self) -> dict[str, object]:
        return {"num_neighbours": self.num_neighbours}

    @classmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> NeighboursChooser:
        reduction = Reduction.restore(arrays)
        num_neighbours = int(str(facts["num_neighbours"]))
        points, outcomes = arrays["points"], arrays["outcomes"]
        return cls(arms, reduction, points, outcomes, num_neighbours, arrays["composed"])
