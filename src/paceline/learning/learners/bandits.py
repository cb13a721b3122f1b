"""Linear bandits: they see the reward of the arm they took and of no other.

They run once through the prompts in random order, each under a load drawn at random, as if these
came as requests. LinUCB takes the largest upper confidence bound, Thompson sampling the
largest reward under weights drawn from the posterior. What is kept
is the mean of the weights. Data in which only some arms were tried (NaN elsewhere) are replayed by
their logged arm. Symbols: N prompts, X inputs, A arms.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.learning.learners.base import (
    Curve,
    Fitted,
    Learner,
    Summary,
    cross_validate,
    rewards_by_load,
)
from paceline.learning.reduce import block_weights, reduce
from paceline.selection.choosers import LinearChooser
from paceline.selection.choosers.linear import linear_inputs

if TYPE_CHECKING:
    from paceline.config import LearningSection
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners.base import Progress

_COMPONENTS: Final = 16
_WIDE: Final = 10.0
_PRIOR: Final = 1.0  # ridge, in units of the inputs, which are given a spread of 1


class LinearBandit:
    """Ridge regression of every arm's reward, kept up to date reward by reward."""

    def __init__(self, num_inputs: int, num_arms: int) -> None:
        self.inverse = np.tile(np.eye(num_inputs) / _PRIOR, (num_arms, 1, 1))  # [A, X, X]
        self.sums = np.zeros((num_arms, num_inputs))  # [A, X] of inputs times rewards
        self.weights = np.zeros((num_arms, num_inputs))  # [A, X]

    def update(self, inputs: np.ndarray, arm: int, reward: float) -> None:
        """One reward of one arm. inputs: [X]. By Sherman and Morrison's formula."""
        turned = self.inverse[arm] @ inputs
        self.inverse[arm] -= np.outer(turned, turned) / (1.0 + inputs @ turned)
        self.sums[arm] += reward * inputs
        self.weights[arm] = self.inverse[arm] @ self.sums[arm]

    def bounds(self, inputs: np.ndarray, width: float) -> np.ndarray:
        """[A] upper confidence bounds, `width` standard deviations up."""
        variances = np.einsum("x,axy,y->a", inputs, self.inverse, inputs, optimize=True)
        return np.asarray(self.weights @ inputs + width * np.sqrt(variances))

    def draw(self, inputs: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
        """[A] rewards under weights drawn from the posterior, its deviations times `width`.

        The reward at given inputs is all that is needed of the draw, and is a normal number.
        """
        variances = np.einsum("x,axy,y->a", inputs, self.inverse, inputs, optimize=True)
        noise = rng.standard_normal(len(variances))
        return np.asarray(self.weights @ inputs + width * np.sqrt(variances) * noise)


class BanditLearner(Learner):
    """`linucb` or `thompson`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fit(self, data: Dataset, settings: LearningSection, on_progress: Progress) -> Fitted:
        rewards = rewards_by_load(data, settings)
        earned, single = cross_validate(
            data, rewards, settings, lambda part, own: self._run(settings, part, own)[0]
        )
        on_progress("cross-validation", 1, 1)
        chooser, taken = self._run(settings, data, rewards)
        # a bandit goes on choosing, whatever it gained
        summary = replace(Summary.judged(len(data), earned, single), constant=False)
        return Fitted(chooser, summary, _running_mean(taken))

    def _run(
        self, settings: LearningSection, data: Dataset, rewards: np.ndarray
    ) -> tuple[LinearChooser, np.ndarray]:
        """(chooser, rewards taken [N]) of one pass."""
        rng = np.random.default_rng([settings.seed, 7])
        weights = block_weights(data.spans, data.features.shape[1], _WIDE)
        reduction = reduce(data.features, weights, _COMPONENTS)
        components = reduction(data.features)
        size = 1.0 / max(float(components.std()), 1e-12)
        loads = rng.integers(len(rewards), size=len(data))
        rows = np.array(settings.loads)[loads] if len(rewards) > 1 else np.ones(len(data))
        inputs = linear_inputs(components * size, rows).astype(np.float64)  # [N, X]
        own = rewards[loads, np.arange(len(data))]  # [N, A]
        # rewards in units of their spread about the mean: no setting depends on a scale
        middle, spread = float(np.nanmean(own)), max(float(np.nanstd(own)), 1e-12)
        bandit = LinearBandit(inputs.shape[1], len(data.arms))
        rank = partial(self._rank, bandit, settings.optimism, rng)
        taken = np.empty(len(data))
        for step, i in enumerate(rng.permutation(len(data))):
            ranked = np.where(np.isfinite(own[i]), rank(inputs[i]), -np.inf)
            arm = int(ranked.argmax())
            bandit.update(inputs[i], arm, (own[i, arm] - middle) / spread)
            taken[step] = own[i, arm]
        learned = bandit.weights.T * spread  # [X, A]
        learned[:-2] *= size
        learned[-1] += middle
        return LinearChooser(data.arms, reduction, learned.astype(np.float32)), taken

    def _rank(
        self, bandit: LinearBandit, width: float, rng: np.random.Generator, inputs: np.ndarray
    ) -> np.ndarray:
        if self.name == "linucb":
            return bandit.bounds(inputs, width)
        return bandit.draw(inputs, width, rng)


def _running_mean(taken: np.ndarray) -> Curve:
    """What was earned so far, at some fifty places."""
    means = np.cumsum(taken) / np.arange(1, len(taken) + 1)
    places = np.unique(np.linspace(0, len(taken) - 1, 50).astype(int))
    return Curve("prompts", tuple((float(i + 1), float(means[i])) for i in places))
