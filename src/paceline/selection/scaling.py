"""Standardised features: training measures the scale, training and serving apply it."""

from __future__ import annotations

from typing import Final

import numpy as np

CLIP: Final = 3.0
"""Largest absolute standardised feature: one extreme value must not decide for a policy."""


def standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and scale = 1/std, [F] float32, of features [N, F].

    A feature that does not vary gets the scale 0.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    std = features.std(axis=0, dtype=np.float64)
    varies = std > 1e-6 * (1.0 + np.abs(mean))
    scale = np.where(varies, 1.0 / np.where(varies, std, 1.0), 0.0)
    return mean.astype(np.float32), scale.astype(np.float32)


def standardise(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return features [..., F] float32, centred, scaled and clipped; NaN counts as the mean."""
    with np.errstate(invalid="ignore"):  # infinity times a scale of 0
        inputs = np.clip((features - mean) * scale, -CLIP, CLIP)
    return np.asarray(np.nan_to_num(inputs, copy=False, nan=0.0))
