"""The reduction of many features to few components: the directions that vary most.

Linear choosers and choosers by distance share it. Symbols: N prompts, F features, Z components.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from paceline.selection.features import standardise

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Reduction:
    """A projection of features to components.

    components = (clip((features - mean) * scale) * weight - centre) @ basis, all float32.

    The weight of each feature is already in `basis` and `centre`.

    bounds: a prompt whose features lie less than the first of them away from all directions is like
    those in training, one beyond the second is not.
    """

    mean: np.ndarray  # [F]
    scale: np.ndarray  # [F] 1/std, 0 for a feature that never varied
    basis: np.ndarray  # [F, Z]
    centre: np.ndarray  # [Z]
    weights: np.ndarray  # [F]
    bounds: np.ndarray  # [2]

    @property
    def num_features(self) -> int:
        return int(self.basis.shape[0])

    @property
    def num_components(self) -> int:
        return int(self.basis.shape[1])

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return components [N, Z] float32 for features [N, F]. NaN counts as the mean."""
        inputs = standardise(features, self.mean, self.scale)
        return np.asarray(inputs @ self.basis - self.centre, dtype=np.float32)

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Return how far features [N, F] lie from all directions of the training prompts, [N]."""
        inputs = standardise(features, self.mean, self.scale) * self.weights
        inside = self(features) ** 2
        outside = (inputs**2).sum(axis=1) - inside.sum(axis=1)
        return np.asarray(np.sqrt(np.maximum(outside, 0.0)))

    def familiarity(self, features: np.ndarray) -> np.ndarray:
        """Return [N] from 1 for prompts like those in training to 0 for others."""
        near, far = self.bounds.tolist()
        beyond = (self.distance(features).astype(np.float64) - near) / max(far - near, 1e-12)
        return np.asarray(1.0 - np.clip(beyond, 0.0, 1.0))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays under the names that choosers save."""
        return {f"reduction.{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> Reduction:
        """Return the reduction from a chooser's arrays.

        Raises KeyError if one is missing, ValueError if their shapes do not fit.
        """
        reduction = cls(*(arrays[f"reduction.{field.name}"] for field in fields(cls)))
        F, Z = reduction.basis.shape
        expected: dict[str, tuple[int, ...]] = {
            "mean": (F,), "scale": (F,), "basis": (F, Z), "centre": (Z,), "weights": (F,),
            "bounds": (2,),
        }  # fmt: skip
        found = {field.name: getattr(reduction, field.name).shape for field in fields(cls)}
        if found != expected:
            raise ValueError(f"arrays {found} where {expected} are expected")
        return reduction
