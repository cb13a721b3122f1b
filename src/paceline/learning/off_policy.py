"""Estimates of a policy's mean reward from logged requests, each of which tried one arm only.

The log must hold decisions that were drawn at random with known probabilities: about an arm that was
not tried only similar requests that tried it tell. Knows no file and no model.

Words: propensity, the probability with which the logging policy chose its arm; weight, the new
policy's probability of that arm over the propensity. Symbols: n requests, A arms, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from paceline.errors import StoreError
from paceline.selection.features import standardisation

_SUM_TOLERANCE: Final = 1e-6
NUM_FOLDS: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class LoggedChoices:
    """Bandit feedback: the rewards of the arms that were chosen; more is better.

    Raises StoreError for a value out of its range.
    """

    chosen: np.ndarray  # [n] int, which arm
    propensities: np.ndarray  # [n]
    rewards: np.ndarray  # [n]
    num_arms: int  # A

    def __post_init__(self) -> None:
        n = len(self.chosen)
        if n < 2 or self.propensities.shape != (n,) or self.rewards.shape != (n,):
            raise StoreError(
                f"{n} logged choices with {self.propensities.shape} propensities and "
                f"{self.rewards.shape} rewards; at least two of each are needed"
            )
        if self.chosen.min() < 0 or self.chosen.max() >= self.num_arms:
            raise StoreError(f"a logged choice is none of the {self.num_arms} arms")
        if not ((self.propensities > 0) & (self.propensities <= 1)).all():
            raise StoreError("a logged propensity is not above 0 and at most 1")
        if not np.isfinite(self.rewards).all():
            raise StoreError("a logged reward is not a finite number")

    def __len__(self) -> int:
        return len(self.chosen)

    def of_chosen(self, table: np.ndarray) -> np.ndarray:
        """Return the entries [n] of a table [n, A] at the chosen arms."""
        return np.asarray(table[np.arange(len(self)), self.chosen])

    def rows(self, places: np.ndarray) -> LoggedChoices:
        """Return some of the choices. places: [m] int, or a mask [n]."""
        return LoggedChoices(
            self.chosen[places], self.propensities[places], self.rewards[places], self.num_arms
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A policy's mean reward, estimated from a log.

    effective_sample_size: the number of requests served by the policy itself that would be as
    informative, by Kish's formula; a small share of n means that the log seldom did what the policy
    would do.
    """

    value: float
    standard_error: float
    effective_sample_size: float
    num_requests: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return a two-sided interval by the central limit theorem, too narrow for a small effective
        sample size.
        """
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * self.standard_error
        return self.value - reach, self.value + reach


def weights(logged: LoggedChoices, probabilities: np.ndarray) -> np.ndarray:
    """Return the weights [n] of a policy with probabilities [n, A] at the logged requests.

    Raises StoreError where the log cannot tell what the policy would gain: where an arm was chosen with
    certainty, the other arms' rewards are unknown.
    """
    if probabilities.shape != (len(logged), logged.num_arms):
        raise StoreError(
            f"probabilities of shape {probabilities.shape} for {len(logged)} logged choices among "
            f"{logged.num_arms} arms"
        )
    if (probabilities < 0).any() or (np.abs(probabilities.sum(axis=1) - 1) > _SUM_TOLERANCE).any():
        raise StoreError("a policy's probabilities are negative, or do not sum to one")
    wanted = logged.of_chosen(probabilities)
    blind = int(((logged.propensities >= 1) & (wanted < 1 - _SUM_TOLERANCE)).sum())
    if blind:
        raise StoreError(_certain(blind, len(logged)))
    return np.asarray(wanted / logged.propensities)


def doubly_robust(
    logged: LoggedChoices, probabilities: np.ndarray, predicted: np.ndarray
) -> Estimate:
    """Estimate by predicted rewards [n, A], corrected by the logged ones.

    The estimate is unbiased for any prediction that was not learned from the request's own reward, see
    `cross_fitted_rewards`. The better the prediction, the smaller the error.
    """
    weight = weights(logged, probabilities)
    return _estimate(_corrected(logged, probabilities, predicted, weight), weight)


def doubly_robust_rewards(logged: LoggedChoices, predicted: np.ndarray) -> np.ndarray:
    """Return a reward [n, A] for every arm of every request, unbiased but noisy.

    A learner that needs the rewards of all arms can use these: the mean over requests of the rewards
    that a policy picks is its doubly robust estimate. Raises StoreError where an arm was chosen with
    certainty.
    """
    certain = int((logged.propensities >= 1).sum())
    if certain:
        raise StoreError(_certain(certain, len(logged)))
    rewards = predicted.astype(np.float64)
    miss = (logged.rewards - logged.of_chosen(predicted)) / logged.propensities
    rewards[np.arange(len(logged)), logged.chosen] += miss
    return rewards


def _certain(count: int, n: int) -> str:
    return (
        f"{count} of {n} logged choices were made with certainty, so nothing is known of the other "
        "arms there; log with explore > 0, or with log.tokens: ids"
    )


def difference(
    logged: LoggedChoices,
    current: np.ndarray,
    candidate: np.ndarray,
    predicted: np.ndarray,
) -> Estimate:
    """Estimate the candidate's mean reward less the current policy's, doubly robust, per request.

    Requests on which both agree contribute no error, so the error is smaller than that of the
    difference of two estimates.
    """
    weight = weights(logged, candidate)
    gains = _corrected(logged, candidate, predicted, weight)
    gains -= _corrected(logged, current, predicted, weights(logged, current))
    return _estimate(gains, weight)


def _corrected(
    logged: LoggedChoices, probabilities: np.ndarray, predicted: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    if predicted.shape != probabilities.shape or not np.isfinite(predicted).all():
        raise StoreError(
            f"predicted rewards must be finite and of shape {probabilities.shape}, got "
            f"{predicted.shape}"
        )
    direct = (probabilities * predicted).sum(axis=1)
    return np.asarray(direct + weight * (logged.rewards - logged.of_chosen(predicted)))


def _estimate(values: np.ndarray, weight: np.ndarray) -> Estimate:
    n, squares = len(values), float(weight @ weight)
    error = float(values.std(ddof=1) / np.sqrt(n))
    effective = float(weight.sum()) ** 2 / squares if squares > 0 else 0.0
    return Estimate(float(values.mean()), error, effective, n)


# --- rewards predicted from the log itself -----------------------------------------------------


def cross_fitted_rewards(
    logged: LoggedChoices, features: np.ndarray, ridge: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Return rewards [n, A] predicted from features [n, F], each request's from the other folds only.

    See `predicted_rewards`. Raises StoreError unless the features are finite, one row per choice.
    """
    from sklearn.model_selection import KFold

    if features.ndim != 2 or len(features) != len(logged) or not np.isfinite(features).all():
        raise StoreError(f"features must be finite, one row for each of {len(logged)} choices")
    predicted = np.empty((len(logged), logged.num_arms))
    folds = KFold(min(NUM_FOLDS, len(logged)), shuffle=True, random_state=seed)
    for rest, own in folds.split(features):
        predicted[own] = predicted_rewards(logged.rows(rest), features[rest], features[own], ridge)
    return predicted


def predicted_rewards(
    logged: LoggedChoices, features: np.ndarray, others: np.ndarray, ridge: float = 1.0
) -> np.ndarray:
    """Return rewards [m, A] of other requests, predicted from logged ones.

    One ridge regression per arm is fitted on the requests that tried it, weighted by 1/propensity so
    that these represent all requests. features: [n, F] of the logged requests; others: [m, F]; ridge:
    in units of the features' variance. An arm that was never tried is predicted at the mean reward.
    """
    mean, scale = standardisation(features)
    inputs, wanted = (features - mean) * scale, (others - mean) * scale
    predicted = np.full((len(others), logged.num_arms), logged.rewards.mean())
    for arm in range(logged.num_arms):
        tried = logged.chosen == arm
        if tried.any():
            weight = 1 / logged.propensities[tried]
            coefficients, intercept = _ridge(
                inputs[tried], logged.rewards[tried], weight / weight.mean(), ridge
            )
            predicted[:, arm] = wanted @ coefficients + intercept
    return predicted


def _ridge(
    inputs: np.ndarray, rewards: np.ndarray, weight: np.ndarray, ridge: float
) -> tuple[np.ndarray, float]:
    """Fit a weighted ridge regression; return (coefficients [F], intercept).

    It solves in the smaller dimension. scikit-learn's Ridge takes milliseconds per fit,
    too long for these small and many regressions.
    """
    n, F = inputs.shape
    share = weight / weight.sum()
    centre, level = share @ inputs, float(share @ rewards)
    root = np.sqrt(weight)
    X, y = root[:, None] * (inputs - centre), root * (rewards - level)
    penalty = ridge * F  # F standardised features have the variance F
    if n < F:
        solved = X.T @ np.linalg.solve(X @ X.T + penalty * np.eye(n), y)
    else:
        solved = np.linalg.solve(X.T @ X + penalty * np.eye(F), X.T @ y)
    return solved, level - float(centre @ solved)
