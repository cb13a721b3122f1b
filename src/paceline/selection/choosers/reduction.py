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
    """

    mean: np.ndarray  # [F]
    scale: np.ndarray  # [F] 1/std, 0 for a feature that never varied
    basis: np.ndarray  # [F, Z]
    centre: np.ndarray  # [Z]

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
        expected = {"mean": (F,), "scale": (F,), "basis": (F, Z), "centre": (Z,)}
        found = {field.name: getattr(reduction, field.name).shape for field in fields(cls)}
        if found != expected:
            raise ValueError(f"arrays {found} where {expected} are expected")
        return reduction
