"""A linear bandit, which sees the reward of the arm it took and of no other.

It passes once through the prompts in random order, each under a load drawn at random, as if they
arrived as requests, and takes the largest upper confidence bound (LinUCB, arXiv 1003.0146, section
3.1). The chooser keeps the mean of the weights. Where only the logged arm's reward is known (NaN
elsewhere), the pass replays the logged arms. Symbols: N prompts, X inputs, A arms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from pydantic import Field

from paceline.learning.learners.base import (
    Curve,
    Fitted,
    Learner,
    LearnerSettings,
    Summary,
    block_weights,
    cross_validate,
    reduce,
    rewards_by_load,
)
from paceline.selection.choosers import LinearChooser
from paceline.selection.choosers.linear import linear_inputs

if TYPE_CHECKING:
    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset

_COMPONENTS: Final = 16
_WIDE: Final = 10.0  # weight of all hidden states, relative to one statistic
_PRIOR: Final = 1.0  # ridge, for inputs scaled to a spread of 1
_CURVE_POINTS: Final = 50


class BanditSettings(LearnerSettings):
    """optimism: width of the confidence bound in standard deviations."""

    optimism: float = Field(default=0.5, ge=0.0)


class LinearBandit:
    """Ridge regression of every arm's reward, updated reward by reward."""

    def __init__(self, num_inputs: int, num_arms: int) -> None:
        self.inverse = np.tile(np.eye(num_inputs) / _PRIOR, (num_arms, 1, 1))  # [A, X, X]
        self.sums = np.zeros((num_arms, num_inputs))  # [A, X] of inputs times rewards
        self.weights = np.zeros((num_arms, num_inputs))  # [A, X]

    def update(self, inputs: np.ndarray, arm: int, reward: float) -> None:
        """Add one reward of one arm, by the Sherman-Morrison formula. inputs: [X]."""
        turned = self.inverse[arm] @ inputs
        self.inverse[arm] -= np.outer(turned, turned) / (1.0 + inputs @ turned)
        self.sums[arm] += reward * inputs
        self.weights[arm] = self.inverse[arm] @ self.sums[arm]

    def bounds(self, inputs: np.ndarray, width: float) -> np.ndarray:
        """Return upper confidence bounds [A], `width` standard deviations above the mean."""
        variances = np.einsum("x,axy,y->a", inputs, self.inverse, inputs, optimize=True)
        return np.asarray(self.weights @ inputs + width * np.sqrt(variances))


class BanditLearner(Learner[BanditSettings]):
    """Passes through the prompts with a `LinearBandit`."""

    name = "linucb"
    Settings = BanditSettings
    chooser = LinearChooser
    search_space: ClassVar = {"optimism": (0.03, 3.0)}
    fits_choices = True
    needs_all_arms = False

    def fit(self, data: Dataset, settings: BanditSettings, on_progress: Progress) -> Fitted:
        rewards = rewards_by_load(data, settings)
        earned, single = cross_validate(
            data, rewards, settings, lambda part, own: _run(settings, part, own)[0]
        )
        on_progress("cross-validation", 1, 1)
        chooser, taken = _run(settings, data, rewards)
        # a bandit keeps choosing whatever it gained
        summary = replace(Summary.judged(len(data), earned, single), constant=False)
        return Fitted(chooser, summary, _running_mean(taken))


def _run(
    settings: BanditSettings, data: Dataset, rewards: np.ndarray
) -> tuple[LinearChooser, np.ndarray]:
    """Return (chooser, rewards taken [N]) of one pass. rewards: [L, N, A]."""
    rng = np.random.default_rng([settings.seed, 7])
    weights = block_weights(data.spans, data.features.shape[1], _WIDE)
    reduction = reduce(data.features, weights, _COMPONENTS)
    components = reduction(data.features)
    size = 1.0 / max(float(components.std()), 1e-12)
    loads = rng.integers(len(rewards), size=len(data))
    rows = np.array(settings.loads)[loads] if len(rewards) > 1 else np.ones(len(data))
    inputs = linear_inputs(components * size, rows).astype(np.float64)  # [N, X]
    own = rewards[loads, np.arange(len(data))]  # [N, A]
    # rewards in units of their spread about the mean, so that no setting depends on their scale
    middle, spread = float(np.nanmean(own)), max(float(np.nanstd(own)), 1e-12)
    bandit = LinearBandit(inputs.shape[1], len(data.arms))
    taken = np.empty(len(data))
    for step, i in enumerate(rng.permutation(len(data))):
        bounds = bandit.bounds(inputs[i], settings.optimism)
        arm = int(np.where(np.isfinite(own[i]), bounds, -np.inf).argmax())
        bandit.update(inputs[i], arm, (own[i, arm] - middle) / spread)
        taken[step] = own[i, arm]
    learned = bandit.weights.T * spread  # [X, A]
    learned[:-2] *= size
    learned[-1] += middle
    return LinearChooser(data.arms, reduction, learned.astype(np.float32)), taken


def _running_mean(taken: np.ndarray) -> Curve:
    """Return the mean reward so far, at some places of the pass. taken: [N]."""
    means = np.cumsum(taken) / np.arange(1, len(taken) + 1)
    places = np.unique(np.linspace(0, len(taken) - 1, _CURVE_POINTS).astype(int))
    return Curve("prompts", tuple((float(i + 1), float(means[i])) for i in places))
