"""Features as learners read them: standardised, weighted by block, reduced to few components.

Symbols: N prompts, F features, Z components.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.selection.choosers import Reduction
from paceline.selection.features import standardisation, standardise

if TYPE_CHECKING:
    from collections.abc import Mapping

_WIDE: Final = 16  # features; a block with more is one source with many outputs


def block_weights(spans: Mapping[str, slice], num_features: int, wide: float = 1.0) -> np.ndarray:
    """Return [F] float32: a wide block, such as all hidden states, weighs `wide` times one statistic.

    Without weights hundreds of hidden units, which fit a few hundred prompts in many ways, would
    outweigh a statistic such as the repetition within a prompt.
    """
    weights = np.ones(num_features, dtype=np.float32)
    for span in spans.values():
        width = span.stop - span.start
        if width > _WIDE:
            weights[span] = wide * width**-0.5
    return weights


def reduce(features: np.ndarray, weights: np.ndarray, num_components: int) -> Reduction:
    """Return the at most `num_components` directions in which weighted features [N, F] vary most."""
    from sklearn.decomposition import PCA

    mean, scale = standardisation(features)
    inputs = (standardise(features, mean, scale) * weights).astype(np.float64)
    N, F = inputs.shape
    # without a solver PCA would draw random projections for large inputs
    pca = PCA(min(num_components, N, F), svd_solver="covariance_eigh" if N > F else "full")
    with np.errstate(invalid="ignore"):  # inputs that do not vary at all
        pca.fit(inputs)
    values = pca.explained_variance_  # [Z], falling
    kept = values > 1e-9 * max(values.max(), 1e-30)
    basis = pca.components_[kept].T  # [F, Z]
    return Reduction(
        mean=mean,
        scale=scale,
        basis=(weights[:, None] * basis).astype(np.float32),
        centre=(pca.mean_ @ basis).astype(np.float32),
    )
