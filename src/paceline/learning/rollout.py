"""Whether a new policy may take the place of the current one: only when it is better beyond doubt.

Two kinds of evidence. Replayed prompts tell what both policies would have taken on each (full
information). Logged requests tell it of the arm that was tried, so its propensity must be known. In
either case the prompts must be ones that neither policy was learned from, and the confidence is that
of one decision: who tries a candidate every day until one passes will adopt a worse one some day.
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
    """Seconds of the same prompts under both policies."""

    current: np.ndarray  # [n]
    candidate: np.ndarray  # [n]

    def __post_init__(self) -> None:
        pair = np.stack([self.current, self.candidate])  # [2, n]
        if pair.ndim != 2 or not np.isfinite(pair).all() or (pair <= 0).any():
            raise StoreError("seconds must be positive numbers, one for each prompt and policy")


@dataclass(frozen=True, slots=True, eq=False)
class Logged:
    """Choices with their propensities, and what both policies would have done on those requests."""

    choices: LoggedChoices  # n
    features: np.ndarray  # [n, F]
    current: np.ndarray  # [n, A] probabilities
    candidate: np.ndarray  # [n, A] probabilities


@dataclass(frozen=True, slots=True)
class Verdict:
    """gain: of the candidate over the current policy, as a share of seconds saved for replayed
    prompts and in units of the reward for logged ones; low: its lower bound.
    """

    adopt: bool
    gain: float
    low: float
    confidence: float
    num_requests: int
    reason: str


def not_compared(num_requests: int, reason: str) -> Verdict:
    """The current policy stays, for nothing can be said of it beside the candidate."""
    return Verdict(False, float("nan"), float("nan"), _CONFIDENCE, num_requests, reason)


def adopt(evidence: Replayed | Logged, confidence: float = _CONFIDENCE) -> Verdict:
    """Adopt the candidate if its gain is above 0 with this (one-sided) confidence.

    Too little evidence is a no, never an error: the current policy stays.
    """
    if isinstance(evidence, Replayed):
        n = len(evidence.current)
        if n < MIN_PROMPTS:
            return _too_little(f"{n} prompts, at least {MIN_PROMPTS}", n, confidence)
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
            effective = f"an effective sample of {estimate.effective_sample_size:.0f} requests"
            return _too_little(f"{effective}, at least {MIN_EFFECTIVE:.0f}", n, confidence)
        gain = estimate.value
        low = gain - NormalDist().inv_cdf(confidence) * estimate.standard_error
    better = low > 0
    what = "better" if better else "not shown to be better"
    reason = f"{what}: gain {gain:+.3g}, with {confidence:.0%} confidence at least {low:+.3g}"
    return Verdict(better, gain, low, confidence, n, reason)


def _too_little(what: str, n: int, confidence: float) -> Verdict:
    reason = f"too little evidence: {what} are needed"
    return Verdict(False, float("nan"), float("nan"), confidence, n, reason)


def _lower_bound(values: np.ndarray, confidence: float) -> float:
    """One-sided bound of a mean [n]: the lower of Student's and of the studentised bootstrap's.

    The first is too bold where losses are rare and large, the second where values are symmetric with
    heavy tails. A loss too rare to be among the values is beyond either.
    """
    n, mean, std = len(values), float(values.mean()), float(values.std(ddof=1))
    if std <= 1e-12 * max(1.0, abs(mean)):
        return mean
    z = NormalDist().inv_cdf(confidence)
    student = (z + (z**3 + z) / (4 * (n - 1))) / n**0.5  # close to the exact quantile at these n
    return mean - std * max(float(student), _bootstrap_quantile(values, mean, confidence))


def _bootstrap_quantile(values: np.ndarray, mean: float, confidence: float) -> float:
    """Of a resample's error over its own standard deviation."""
    n = len(values)
    rng = np.random.default_rng(n)
    ratios: list[np.ndarray] = []
    rows = max(1, _CHUNK // n)
    for start in range(0, _RESAMPLES, rows):
        again = values[rng.integers(n, size=(min(rows, _RESAMPLES - start), n))]
        spread = again.std(axis=1, ddof=1)
        # a resample of one value over and over says nothing of the spread: count it as extreme
        ratio = np.full(len(again), np.inf)
        np.divide(again.mean(axis=1) - mean, spread, out=ratio, where=spread > 0)
        ratios.append(ratio)
    return float(np.quantile(np.concatenate(ratios), confidence, method="higher"))
