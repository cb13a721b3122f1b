"""Features to what learners read: standardised, weighed by block, and turned to few components.

Symbols: N prompts, F features, Z components.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.selection.choosers import Reduction
from paceline.selection.scaling import standardisation, standardise

if TYPE_CHECKING:
    from collections.abc import Mapping

_WIDE: Final = 16  # features; a block of more is one source that says many things at once


def block_weights(spans: Mapping[str, slice], num_features: int, wide: float = 1.0) -> np.ndarray:
    """[F] float32: a wide block, all hidden states say, weighs `wide` times one statistic.

    Otherwise what a statistic says (that a prompt repeats itself, say) drowns in hundreds of hidden
    units, which fit a few hundred prompts in countless ways.
    """
    weights = np.ones(num_features, dtype=np.float32)
    for span in spans.values():
        width = span.stop - span.start
        if width > _WIDE:
            weights[span] = wide * width**-0.5
    return weights


def reduce(features: np.ndarray, weights: np.ndarray, num_components: int) -> Reduction:
    """The directions in which weighed features [N, F] vary most, at most `num_components`."""
    mean, scale = standardisation(features)
    inputs = (standardise(features, mean, scale) * weights).astype(np.float64)
    centre = inputs.mean(axis=0)
    inputs -= centre
    gram = inputs.T @ inputs if len(inputs) > inputs.shape[1] else inputs @ inputs.T
    values, vectors = np.linalg.eigh(gram)
    largest = np.argsort(values)[::-1][:num_components]
    kept = largest[values[largest] > 1e-9 * max(values.max(), 1e-30)]
    basis = vectors[:, kept]
    if len(inputs) <= inputs.shape[1]:
        basis = inputs.T @ basis / np.sqrt(values[kept])
    return Reduction(
        mean=mean,
        scale=scale,
        basis=(weights[:, None] * basis).astype(np.float32),
        centre=(centre @ basis).astype(np.float32),
    )
