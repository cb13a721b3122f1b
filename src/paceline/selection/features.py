"""The default features of a request: hidden states of the target's prefill, text statistics, the load.

This module knows no task label, no id and no drafter. Nothing here runs a model: the prefill has
computed the hidden states, and the statistics take a few sorts over the prompt's tokens. Symbols: D the
target's hidden size, S statistics, F = 2 D + S, n prompt tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.contracts import Context

STATISTICS: Final = (
    "log_prompt_tokens",
    "bigram_overlap",
    "trigram_overlap",
    "repeated_tokens",
    "temperature",
    "log_rows_in_flight",
)

CLIP: Final = 3.0
"""Largest absolute standardised feature: one extreme value must not decide for a policy."""

_ID_BITS: Final = 21  # three ids in one int64; ids above 2**21 may collide with others


def num_features(hidden_size: int) -> int:
    """Return F, the length of a feature vector for a target of this hidden size."""
    return 2 * hidden_size + len(STATISTICS)


def feature_vector(context: Context) -> np.ndarray:
    """Return [F] float32: hidden states, then statistics. Raises RequestError without a prompt."""
    return np.concatenate((hidden_states(context), statistics(context)))


def hidden_states(context: Context) -> np.ndarray:
    """Return [2 D] float32: the mean over the prompt, and the state at its last token."""
    return np.concatenate((context.mean_hidden, context.last_hidden)).astype(np.float32, copy=False)


def statistics(context: Context) -> np.ndarray:
    """Return [S] float32, in the order of STATISTICS. Raises RequestError without a prompt."""
    tokens = np.asarray(context.prompt_tokens, dtype=np.int64)  # [n]
    if tokens.size == 0:
        raise RequestError("the prompt is empty; give at least one token")
    return np.array(
        (
            np.log(tokens.size),
            ngram_overlap(tokens, 2),
            ngram_overlap(tokens, 3),
            ngram_overlap(tokens, 1),
            context.sampling.temperature,
            np.log(max(context.rows_in_flight, 1)),
        ),
        dtype=np.float32,
    )


def ngram_overlap(tokens: np.ndarray, n: int) -> float:
    """Return the share of a text's n-grams (n up to 3) that occur earlier in it. tokens: [T] int64.

    It is high where a text repeats itself, and looking up the continuation may pay there.
    """
    count = tokens.size - n + 1
    if count < 2:
        return 0.0
    keys = tokens[:count]
    for shift in range(1, n):
        keys = (keys << _ID_BITS) | tokens[shift : shift + count]
    # sorting and counting steps is several times cheaper than np.unique at these lengths
    ordered = np.sort(keys)
    return float(np.count_nonzero(ordered[1:] == ordered[:-1])) / count


# --- standardised features ------------------------------------------------------------------------


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
