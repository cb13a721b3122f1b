"""What a policy would have earned on logged requests, each of which tried one arm only.

Needs decisions that were drawn at random with known probabilities: the arm that was not tried is
known only from requests like it where it was. Knows no file and no model.

Words: propensity, the probability with which the logging policy chose the arm it chose; weight, the
new policy's probability of that arm over the propensity. Symbols: n requests, A arms, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from paceline.errors import StoreError
from paceline.selection.scaling import standardisation

_SUM_TOLERANCE: Final = 1e-6
NUM_FOLDS: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class LoggedChoices:
    """Bandit feedback. Rewards are of the arm that was chosen; more is better.

    Raises StoreError if a value cannot be what it says.
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
        """[n] the entries of a table [n, A] at the chosen arms."""
        return np.asarray(table[np.arange(len(self)), self.chosen])


@dataclass(frozen=True, slots=True)
class Estimate:
    """A policy's mean reward, as far as the log can tell.

    effective_sample_size: how many requests of the policy's own would say as much, by Kish's formula;
    a small share of n means that the log seldom did what the policy would do.
    """

    value: float
    standard_error: float
    effective_sample_size: float
    num_requests: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided, by the central limit theorem: too narrow where the effective size is small."""
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * self.standard_error
        return self.value - reach, self.value + reach


def weights(logged: LoggedChoices, probabilities: np.ndarray) -> np.ndarray:
    """[n] for a policy with these probabilities [n, A] at the logged requests.

    Raises StoreError where the log never tries what the policy would do: an arm that was chosen with
    certainty says nothing of the others.
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


def ips(logged: LoggedChoices, probabilities: np.ndarray) -> Estimate:
    """Inverse propensity scoring: the mean of weighted rewards. Unbiased, and of high variance."""
    weight = weights(logged, probabilities)
    return _estimate(weight * logged.rewards, weight)


def snips(logged: LoggedChoices, probabilities: np.ndarray) -> Estimate:
    """The same divided by the mean weight: never outside the rewards' range, biased by O(1/n)."""
    weight = weights(logged, probabilities)
    total = float(weight.sum())
    if total == 0:
        raise StoreError("the log never did what this policy would do; log more with explore > 0")
    value = float(weight @ logged.rewards) / total
    # the error of a ratio, by its linear part
    error = float(np.sqrt(weight**2 @ (logged.rewards - value) ** 2)) / total
    return Estimate(value, error, _effective(weight), len(logged))


def doubly_robust(
    logged: LoggedChoices, probabilities: np.ndarray, predicted: np.ndarray
) -> Estimate:
    """A model's rewards [n, A], corrected by what was logged.

    Unbiased whatever the model, if no request's prediction was learned from its own reward; see
    `cross_fitted_rewards`. The better the model, the smaller the error.
    """
    weight = weights(logged, probabilities)
    return _estimate(_corrected(logged, probabilities, predicted, weight), weight)


def doubly_robust_rewards(logged: LoggedChoices, predicted: np.ndarray) -> np.ndarray:
    """[n, A] a reward for every arm of every request, right on average where it is not right itself.

    Whoever learns from full information can learn from these: the mean over requests of what any
    policy picks from them is its doubly robust estimate. Raises StoreError where an arm was chosen
    with certainty.
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
    """The candidate's mean reward less the current policy's, doubly robust, request by request:
    where both do the same they cannot differ, so this is sharper than two estimates apart.
    """
    of_candidate, of_current = weights(logged, candidate), weights(logged, current)
    gains = _corrected(logged, candidate, predicted, of_candidate)
    gains -= _corrected(logged, current, predicted, of_current)
    return _estimate(gains, of_candidate)


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
    n = len(values)
    error = float(values.std(ddof=1) / np.sqrt(n))
    return Estimate(float(values.mean()), error, _effective(weight), n)


def _effective(weight: np.ndarray) -> float:
    squares = float(weight @ weight)
    return float(weight.sum()) ** 2 / squares if squares > 0 else 0.0


# --- a reward model from the log itself -----------------------------------------------------------


def cross_fitted_rewards(
    logged: LoggedChoices, features: np.ndarray, ridge: float = 1.0, seed: int = 0
) -> np.ndarray:
    """[n, A] rewards predicted from features [n, F], each request's from the other folds only.

    One ridge regression an arm on the requests that tried it, weighted by 1/propensity so that they
    stand for all requests; `ridge` is in units of the features' variance. An arm that a fold's
    training part never tried is predicted at the mean reward.
    """
    fold = np.random.default_rng(seed).permutation(len(logged)) % NUM_FOLDS
    predicted = np.empty((len(logged), logged.num_arms))
    for held_out in range(NUM_FOLDS):
        own, rest = fold == held_out, fold != held_out
        model = RewardModel.fit(
            features[rest],
            LoggedChoices(
                logged.chosen[rest],
                logged.propensities[rest],
                logged.rewards[rest],
                logged.num_arms,
            ),
            ridge,
        )
        predicted[own] = model.predict(features[own])
    return predicted


@dataclass(frozen=True, slots=True, eq=False)
class RewardModel:
    """Linear in standardised features, one column of coefficients an arm."""

    mean: np.ndarray  # [F]
    scale: np.ndarray  # [F]
    coefficients: np.ndarray  # [F, A]
    intercepts: np.ndarray  # [A]

    @classmethod
    def fit(cls, features: np.ndarray, logged: LoggedChoices, ridge: float = 1.0) -> RewardModel:
        """From features [n, F] and what was logged; see `cross_fitted_rewards`."""
        if features.ndim != 2 or len(features) != len(logged) or not np.isfinite(features).all():
            raise StoreError(f"features must be finite, one row for each of {len(logged)} choices")
        mean, scale = standardisation(features)
        inputs = (features - mean) * scale
        coefficients = np.zeros((features.shape[1], logged.num_arms))
        intercepts = np.full(logged.num_arms, logged.rewards.mean())
        for arm in range(logged.num_arms):
            tried = logged.chosen == arm
            if tried.any():
                weight = 1 / logged.propensities[tried]
                coefficients[:, arm], intercepts[arm] = _ridge(
                    inputs[tried], logged.rewards[tried], weight / weight.mean(), ridge
                )
        return cls(mean, scale, coefficients, intercepts)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """[n, A] for features [n, F]."""
        inputs = (features - self.mean) * self.scale
        return np.asarray(inputs @ self.coefficients + self.intercepts)


def _ridge(
    inputs: np.ndarray, rewards: np.ndarray, weight: np.ndarray, ridge: float
) -> tuple[np.ndarray, float]:
    """(coefficients [F], intercept) of a weighted regression; solved in the smaller dimension."""
    n, F = inputs.shape
    share = weight / weight.sum()
    centre, level = share @ inputs, float(share @ rewards)
    root = np.sqrt(weight)[:, None]
    X, y = root * (inputs - centre), root[:, 0] * (rewards - level)
    penalty = ridge * F  # F standardised features have a variance of F together
    if n < F:
        solved = X.T @ np.linalg.solve(X @ X.T + penalty * np.eye(n), y)
    else:
        solved = np.linalg.solve(X.T @ X + penalty * np.eye(F), X.T @ y)
    return solved, level - float(centre @ solved)
