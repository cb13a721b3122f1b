"""Learns what every arm would do on a prompt, without a price: rates of rounds, of those
that draft nothing, and of drafted tokens.

The outcomes of arms jump from one kind of prompt to another and hardly vary within one, so a linear
fit blurs them. What is fitted by least squares is a mixture: a softmax gate over a few kinds, each
with outcomes of its own, several gates from different beginnings averaged. Prices enter only where
cross-validation judges how fast the choices are. Symbols: N prompts, B of them in a minibatch, Z
components, M kinds, E gates, A arms, O = 3 A + 1 outcomes, L loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from paceline.learning.learners.base import (
    Curve,
    Fitted,
    Learner,
    Summary,
    earned_by,
    fold_numbers,
    num_folds,
    outcome_weights,
    outcomes_of,
    rewards_by_load,
)
from paceline.learning.learners.networks import one_thread
from paceline.learning.reduce import block_weights, reduce
from paceline.selection.choosers import AcceptanceChooser

if TYPE_CHECKING:
    from paceline.config import LearningSection
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners.base import Progress
    from paceline.selection.choosers import Reduction

_COMPONENTS: Final = (32, 64)  # at least, at most
_PROMPTS_A_COMPONENT: Final = 8  # fewer do not tell a direction from noise
_WIDE: Final = 10.0  # the hidden states' weight beside one statistic
_NORM: Final = 10.0  # of a typical input, so that gates are decided from the beginning
_GATES: Final = 12
_LEARNING_RATE: Final = 2e-2  # at the beginning; it falls to 0 at the end
_STEPS: Final = 400
_LEAST_EPOCHS: Final = 20
_JUDGED: Final = 12  # times on the way
_MOST_JUDGED: Final = 400  # prompts of a fold that are priced at each judgement
_FINAL: Final = 100  # stream of what is kept; the folds' are their numbers


class MixtureTraining:
    """E mixtures in training side by side on the same prompts."""

    def __init__(self, data: Dataset, settings: LearningSection, stream: int) -> None:
        self._data = data
        self._settings = settings
        self._generator = torch.Generator().manual_seed(1000 * settings.seed + stream)
        weights = block_weights(data.spans, data.features.shape[1], _WIDE)
        num_components = int(np.clip(len(data) // _PROMPTS_A_COMPONENT, *_COMPONENTS))
        self._reduction = reduce(data.features, weights, num_components)
        inputs = self._reduction(data.features)  # [N, Z]
        self._size = _NORM / max(float(np.sqrt((inputs**2).sum(axis=1).mean())), 1e-12)
        outcomes = outcomes_of(data)
        self._low, self._high = outcomes.min(axis=0), outcomes.max(axis=0)
        weights = outcome_weights(data)
        self._mean = (weights * outcomes).mean(axis=0)
        self._spread = outcomes.std(axis=0) + 1e-3
        self._weights = torch.from_numpy(weights.astype(np.float32))  # [N, O]
        self._inputs = torch.from_numpy(inputs * np.float32(self._size))
        standard = (outcomes - self._mean) / self._spread
        self._outcomes = torch.from_numpy(standard.astype(np.float32))  # [N, O]
        E, Z, M, O = _GATES, inputs.shape[1], settings.kinds, outcomes.shape[1]  # noqa: E741
        self.gates = 0.5 * torch.randn((E, Z, M), generator=self._generator)
        self.biases = torch.zeros((E, 1, M))
        self.kinds = 0.1 * torch.randn((E, M, O), generator=self._generator)
        groups = [
            {"params": [self.gates], "weight_decay": settings.gate_decay},
            {"params": [self.biases, self.kinds], "weight_decay": 0.0},
        ]
        for parameter in (self.gates, self.biases, self.kinds):
            parameter.requires_grad_()
        self._optimiser = torch.optim.AdamW(groups, lr=_LEARNING_RATE, fused=True)

    def train(self, begin: float, end: float) -> None:
        """From one share of the whole training to another; each mixture has its own error."""
        num_epochs = self.num_epochs()
        for epoch in range(round(begin * num_epochs), round(end * num_epochs)):
            for group in self._optimiser.param_groups:
                group["lr"] = _LEARNING_RATE * (1.0 - epoch / num_epochs)
            self._epoch()

    def num_epochs(self) -> int:
        """Passes over the prompts of the whole training."""
        a_pass = -(-len(self._inputs) // self._settings.batch_size)
        return max(_STEPS // a_pass, _LEAST_EPOCHS)

    def _epoch(self) -> None:
        order = torch.randperm(len(self._inputs), generator=self._generator)
        for batch in torch.split(order, self._settings.batch_size):
            shares = (self._inputs[batch] @ self.gates + self.biases).softmax(dim=2)  # [E, B, M]
            error = shares @ self.kinds - self._outcomes[batch]  # [E, B, O]
            loss = (self._weights[batch] * error**2).mean(dim=(1, 2)).sum()
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()

    @torch.no_grad()
    def chooser(self) -> AcceptanceChooser:
        """As served: sizes become part of the gates and kinds."""
        gates = self.gates.numpy() * self._size  # [E, Z, M]
        kinds = self.kinds.numpy() * self._spread + self._mean
        return _chooser(
            self._data,
            self._reduction,
            gates,
            self.biases.numpy()[:, 0],
            kinds,
            self._low,
            self._high,
        )

    def average(self) -> AcceptanceChooser:
        """One kind for all: arms do what they do on average."""
        return _chooser(
            self._data,
            self._reduction,
            np.zeros((1, self._reduction.num_components, 1)),
            np.zeros((1, 1)),
            self._mean[None, None],
            self._low,
            self._high,
        )


def _chooser(data: Dataset, reduction: Reduction, *learned: np.ndarray) -> AcceptanceChooser:
    arrays = (array.astype(np.float32) for array in learned)
    return AcceptanceChooser(data.arms, reduction, *arrays)


@dataclass(slots=True)
class _Fold:
    """Mixtures, and prompts that they do not learn from."""

    training: MixtureTraining
    held: Dataset
    rewards: np.ndarray  # [L, n, A]

    def taken(self, arms: np.ndarray) -> np.ndarray:
        """[n] rewards of one arm a load. arms: [L] places."""
        return np.asarray(self.rewards[np.arange(len(arms)), :, arms].mean(axis=0))

    def judge(self, settings: LearningSection) -> np.ndarray:
        """[n] rewards of what would be chosen."""
        return earned_by(self.training.chooser(), self.held, self.rewards, settings)


class AcceptanceLearner(Learner):
    """Trains for a fixed number of steps: few kinds do not follow noise, so nothing is gained by
    stopping early, and when to stop is not for a noisy judgement to say.

    Cross-validation tells what is gained. Unless that is more than its standard error, every prompt
    gets the average prediction, and so the arm that is best on average at the prices of the moment.
    """

    name = "acceptance"

    def fit(self, data: Dataset, settings: LearningSection, on_progress: Progress) -> Fitted:
        rewards = rewards_by_load(data, settings)
        best = rewards.mean(axis=1).argmax(axis=1)  # [L]
        points = []
        with one_thread():
            folds = _make_folds(data, rewards, settings)
            single = np.concatenate([fold.taken(best) for fold in folds])
            for turn in range(_JUDGED):
                for fold in folds:
                    fold.training.train(turn / _JUDGED, (turn + 1) / _JUDGED)
                earned = np.concatenate([fold.judge(settings) for fold in folds])
                points.append(((turn + 1) / _JUDGED, float(earned.mean())))
                on_progress("cross-validation", turn + 1, _JUDGED)
            summary = Summary.judged(len(data), earned, single)
            final = MixtureTraining(data, settings, _FINAL)
            if not summary.constant:
                final.train(0.0, 1.0)
            on_progress("training", final.num_epochs(), final.num_epochs())
        chooser = final.average() if summary.constant else final.chooser()
        return Fitted(chooser, summary, Curve("share of the training", tuple(points)))


def _make_folds(data: Dataset, rewards: np.ndarray, settings: LearningSection) -> list[_Fold]:
    number = fold_numbers(data.groups, settings.seed)
    folds = []
    for i in range(num_folds(len(data))):
        own = np.flatnonzero(number == i)[:_MOST_JUDGED]
        training = MixtureTraining(data.rows(number != i), settings, stream=i)
        folds.append(_Fold(training, data.rows(own), rewards[:, own]))
    return folds
