"""Learns what each arm does on a prompt, free of prices.

Per arm these are the rates of rounds, of rounds without a draft, and of drafted tokens. They jump from
one kind of prompt to another and hardly vary within a kind, so a linear fit would blur them. A mixture
is fitted instead, by least squares: a softmax gate over a few kinds, each with its own outcomes,
averaged over several gates with different initial values. Prices enter only where cross-validation
judges the choices. Symbols: N prompts, B of them in a minibatch, Z components, M kinds, E gates, A
arms, O outcomes, L loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import torch
from pydantic import Field

from paceline.learning.learners.base import (
    Curve,
    Fitted,
    Learner,
    LearnerSettings,
    Summary,
    block_weights,
    bounded,
    earned_by,
    judged_folds,
    outcome_weights,
    outcomes_of,
    reduce,
    rewards_by_load,
)
from paceline.learning.learners.networks import one_thread
from paceline.selection.choosers import AcceptanceChooser

if TYPE_CHECKING:
    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset
    from paceline.selection.choosers import Reduction

_COMPONENTS: Final = (32, 64)  # at least, at most
_PROMPTS_PER_COMPONENT: Final = 8  # with fewer, a direction cannot be told from noise
_WIDE: Final = 10.0  # weight of all hidden states, relative to one statistic
_NORM: Final = 10.0  # of a typical input, so that gates differ from the first step
_GATES: Final = 12
_LEARNING_RATE: Final = 2e-2  # at the beginning; it falls to 0 at the end
_STEPS: Final = 400
_LEAST_EPOCHS: Final = 20
_NUM_JUDGEMENTS: Final = 12  # during the training
_MOST_JUDGED: Final = 400  # prompts of a fold that are priced at each judgement
_FINAL: Final = 100  # random stream of the final training; each fold's stream is its number


class AcceptanceSettings(LearnerSettings):
    """kinds: of prompt. gate_decay: weight decay of the gates. batch_size: prompts per step."""

    kinds: int = Field(default=48, ge=1)
    gate_decay: float = Field(default=0.1, ge=0.0)
    batch_size: int = Field(default=64, ge=1)


class MixtureTraining:
    """E mixtures that train in parallel on the same prompts."""

    def __init__(self, data: Dataset, settings: AcceptanceSettings, stream: int) -> None:
        self._data = data
        self._settings = settings
        self._generator = torch.Generator().manual_seed(1000 * settings.seed + stream)
        weights = block_weights(data.spans, data.features.shape[1], _WIDE)
        num_components = int(np.clip(len(data) // _PROMPTS_PER_COMPONENT, *_COMPONENTS))
        self._reduction = reduce(data.features, weights, num_components)
        if stream == _FINAL:
            self._reduction = bounded(self._reduction, data, settings.seed)
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
        """Train from one share of all epochs to another. Each mixture has its own error."""
        num_epochs = self.num_epochs()
        for epoch in range(round(begin * num_epochs), round(end * num_epochs)):
            for group in self._optimiser.param_groups:
                group["lr"] = _LEARNING_RATE * (1.0 - epoch / num_epochs)
            self._epoch()

    def num_epochs(self) -> int:
        """Return the number of passes over the prompts in the whole training."""
        steps_per_epoch = -(-len(self._inputs) // self._settings.batch_size)
        return max(_STEPS // steps_per_epoch, _LEAST_EPOCHS)

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
        """Return the chooser for serving. The scales become part of its gates and kinds."""
        return _chooser(
            self._data,
            self._reduction,
            self.gates.numpy() * self._size,  # [E, Z, M]
            self.biases.numpy()[:, 0],
            self.kinds.numpy() * self._spread + self._mean,
            self._low,
            self._high,
            self._mean,
        )

    def average(self) -> AcceptanceChooser:
        """Return a chooser of one kind, which predicts the mean outcomes for every prompt."""
        return _chooser(
            self._data,
            self._reduction,
            np.zeros((1, self._reduction.num_components, 1)),
            np.zeros((1, 1)),
            self._mean[None, None],
            self._low,
            self._high,
            self._mean,
        )


def _chooser(data: Dataset, reduction: Reduction, *learned: np.ndarray) -> AcceptanceChooser:
    gates, biases, kinds, low, high, average = (array.astype(np.float32) for array in learned)
    composed = np.array(data.composed, dtype=np.int64)
    return AcceptanceChooser(
        data.arms, reduction, gates, biases, kinds, low, high, average, composed
    )


@dataclass(slots=True)
class _Fold:
    training: MixtureTraining
    held_out: Dataset
    rewards: np.ndarray  # [L, n, A]

    def rewards_of(self, arms: np.ndarray) -> np.ndarray:
        """Return the mean rewards [n] over loads of one arm per load. arms: [L] places."""
        return np.asarray(self.rewards[np.arange(len(arms)), :, arms].mean(axis=0))

    def judge(self, settings: AcceptanceSettings) -> np.ndarray:
        """Return the rewards [n] of the arms that would be chosen now."""
        return earned_by(self.training.chooser(), self.held_out, self.rewards, settings)


class AcceptanceLearner(Learner[AcceptanceSettings]):
    """Trains for a fixed number of steps.

    A prompt unlike those in training gets the average prediction, and with it the arm that is best on
    average at the current prices. A few kinds do not follow noise, so stopping early gains nothing, and
    a noisy judgement should not decide when to stop. Cross-validation measures the gain. Unless the gain
    is larger than its standard error, every prompt gets the average prediction.
    """

    name = "acceptance"
    Settings = AcceptanceSettings
    chooser = AcceptanceChooser
    search_space: ClassVar = {"kinds": (6, 96), "gate_decay": (1e-2, 2.0)}
    predicts_work = True

    def fit(self, data: Dataset, settings: AcceptanceSettings, on_progress: Progress) -> Fitted:
        rewards = rewards_by_load(data, settings)
        best = rewards.mean(axis=1).argmax(axis=1)  # [L]
        points = []
        with one_thread():
            folds = _make_folds(data, rewards, settings)
            single = np.concatenate([fold.rewards_of(best) for fold in folds])
            for turn in range(_NUM_JUDGEMENTS):
                for fold in folds:
                    fold.training.train(turn / _NUM_JUDGEMENTS, (turn + 1) / _NUM_JUDGEMENTS)
                earned = np.concatenate([fold.judge(settings) for fold in folds])
                points.append(((turn + 1) / _NUM_JUDGEMENTS, float(earned.mean())))
                on_progress("cross-validation", turn + 1, _NUM_JUDGEMENTS)
            summary = Summary.judged(len(data), earned, single)
            final = MixtureTraining(data, settings, _FINAL)
            if not summary.constant:
                final.train(0.0, 1.0)
            on_progress("training", final.num_epochs(), final.num_epochs())
        chooser = final.average() if summary.constant else final.chooser()
        return Fitted(chooser, summary, Curve("share of the training", tuple(points)))


def _make_folds(data: Dataset, rewards: np.ndarray, settings: AcceptanceSettings) -> list[_Fold]:
    folds = []
    for i, (rest, own) in enumerate(judged_folds(data, settings.seed)):
        held_out = own[:_MOST_JUDGED]
        training = MixtureTraining(data.rows(rest), settings, stream=i)
        folds.append(_Fold(training, data.rows(held_out), rewards[:, held_out]))
    return folds
