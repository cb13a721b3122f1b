"""The policy's network as plain arrays: one hidden layer, one logit an arm, evaluated in numpy.

Knows no arm by name and cannot be trained here. The published method's policy shape (arXiv
2408.08470) is not confirmed; this one is ours. Symbols: N prompts, F features, H hidden units, A
arms.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np

CLIP: Final = 3.0
"""Standardised features end here: one unheard-of value must not drive the policy."""


@dataclass(frozen=True, slots=True)
class PolicyNetwork:
    """logits = tanh(clip((features - mean) * scale) @ w1 + b1) @ w2 + b2, all float32.

    `scale` is 1/std, and 0 for a feature that never varied in training: nothing is known of it.
    """

    mean: np.ndarray  # [F]
    scale: np.ndarray  # [F]
    w1: np.ndarray  # [F, H]
    b1: np.ndarray  # [H]
    w2: np.ndarray  # [H, A]
    b2: np.ndarray  # [A]

    @property
    def num_features(self) -> int:
        return int(self.w1.shape[0])

    @property
    def num_arms(self) -> int:
        return int(self.w2.shape[1])

    def arrays(self) -> dict[str, np.ndarray]:
        """All parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[..., A] for features [..., F]. A value that is not a number counts as the mean."""
        inputs = standardise(features, self.mean, self.scale)
        hidden = np.tanh(inputs @ self.w1 + self.b1)
        return np.asarray(hidden @ self.w2 + self.b2, dtype=np.float32)


def standardise(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[..., F] float32: centred, scaled and clipped; learning and serving share it."""
    with np.errstate(invalid="ignore"):  # infinity times a scale of 0
        inputs = np.clip((features - mean) * scale, -CLIP, CLIP)
    return np.asarray(np.nan_to_num(inputs, copy=False, nan=0.0))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, in float64 so that they sum to one."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
