"""The decision whether a new policy replaces the current one, which takes a significant gain.

There are two kinds of evidence. Replayed prompts tell the seconds of both policies on each prompt.
Logged requests tell the reward of the arm that was tried, whose propensity must be known. In either
case neither policy may have been learned from the prompts. The confidence is that of one decision:
repeated tests of new candidates will adopt a worse one at some time.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from paceline.errors import StoreError
from paceline.learning.off_policy import LoggedChoices, cross_fitted_rewards, difference

MIN_PROMPTS: Final = 100
MIN_EFFECTIVE: Final = 100.0
_RESAMPLES: Final = 2000
_CHUNK: Final = 2**20  # resampled values at a time
_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """Seconds of the same prompts under both policies. Raises StoreError if they are not positive."""

    current: np.ndarray  # [n]
    candidate: np.ndarray  # [n]

    def __post_init__(self) -> None:
        pair = np.stack([self.current, self.candidate])  # [2, n]
        if pair.ndim != 2 or not np.isfinite(pair).all() or (pair <= 0).any():
            raise StoreError("seconds must be positive numbers, one for each prompt and policy")


@dataclass(frozen=True, slots=True, eq=False)
class Logged:
    """Choices with their propensities, and both policies' probabilities on those requests."""

    choices: LoggedChoices  # n
    features: np.ndarray  # [n, F]
    current: np.ndarray  # [n, A] probabilities
    candidate: np.ndarray  # [n, A] probabilities


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision. gain: of the candidate over the current policy, for replayed prompts as a share of
    the seconds, for logged ones in units of the reward; low: its lower bound.
    """

    adopt: bool
    gain: float
    low: float
    confidence: float
    num_requests: int
    reason: str


def not_compared(num_requests: int, reason: str, confidence: float = _CONFIDENCE) -> Verdict:
    """Return the verdict that the current policy stays, because no comparison is possible."""
    return Verdict(False, float("nan"), float("nan"), confidence, num_requests, reason)


def adopt(evidence: Replayed | Logged, confidence: float = _CONFIDENCE) -> Verdict:
    """Return whether to adopt the candidate: if its gain is above 0 with this one-sided confidence.

    With too little evidence the current policy stays; that is no error.
    """
    if isinstance(evidence, Replayed):
        n = len(evidence.current)
        if n < MIN_PROMPTS:
            few = f"{n} prompts, at least {MIN_PROMPTS}"
            return not_compared(n, f"too little evidence: {few} are needed", confidence)
        saved = (evidence.current - evidence.candidate) / evidence.current.mean()
        gain, low = float(saved.mean()), _lower_bound(saved, confidence)
    else:
        choices = evidence.choices
        n = len(choices)
        estimate = difference(
            choices,
            evidence.current,
            evidence.candidate,
            cross_fitted_rewards(choices, evidence.features),
        )
        if estimate.effective_sample_size < MIN_EFFECTIVE:
            few = f"an effective sample of {estimate.effective_sample_size:.0f} requests"
            few += f", at least {MIN_EFFECTIVE:.0f}"
            return not_compared(n, f"too little evidence: {few} are needed", confidence)
        gain = estimate.value
        low = gain - NormalDist().inv_cdf(confidence) * estimate.standard_error
    better = low > 0
    what = "better" if better else "not shown to be better"
    reason = f"{what}: gain {gain:+.3g}, with {confidence:.0%} confidence at least {low:+.3g}"
    return Verdict(better, gain, low, confidence, n, reason)


def _lower_bound(values: np.ndarray, confidence: float) -> float:
    """Return a one-sided bound of the mean of values [n]: the lower of Student's and of the studentised
    bootstrap's.

    Student's is too high where losses are rare and large, the bootstrap's where values are symmetric
    with heavy tails. Neither sees a loss that is too rare to be among the values.
    """
    n, mean, std = len(values), float(values.mean()), float(values.std(ddof=1))
    if std <= 1e-12 * max(1.0, abs(mean)):
        return mean
    z = NormalDist().inv_cdf(confidence)
    student = (z + (z**3 + z) / (4 * (n - 1))) / n**0.5  # close to the exact quantile at these n
    return mean - std * max(float(student), _bootstrap_quantile(values, mean, confidence))


def _bootstrap_quantile(values: np.ndarray, mean: float, confidence: float) -> float:
    """Return a quantile of a resample's error over its own standard deviation."""
    n = len(values)
    rng = np.random.default_rng(n)
    ratios: list[np.ndarray] = []
    rows = max(1, _CHUNK // n)
    for start in range(0, _RESAMPLES, rows):
        again = values[rng.integers(n, size=(min(rows, _RESAMPLES - start), n))]
        spread = again.std(axis=1, ddof=1)
        # the spread is unknown in a resample of one repeated value: count it as extreme
        ratio = np.full(len(again), np.inf)
        np.divide(again.mean(axis=1) - mean, spread, out=ratio, where=spread > 0)
        ratios.append(ratio)
    return float(np.quantile(np.concatenate(ratios), confidence, method="higher"))
