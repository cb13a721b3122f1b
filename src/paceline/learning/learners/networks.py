"""Networks that rank arms, trained by three losses on offline rewards of every arm.

`reinforce` samples arms and follows the policy gradient of their centred rewards, as arXiv 2408.08470;
baseline, optimiser, network and settings are ours. Since every arm is scored for every prompt,
`policy_gradient` maximises the expected reward without sampling; `cost_sensitive` minimises the
cross-entropy to shares that fall with an arm's regret. Rewards depend on the load, so each epoch
draws a new load per prompt. Symbols: N prompts, B of them in a minibatch, F features, H hidden units, A
arms, L loads, S samples per prompt.
"""

from __future__ import annotations

from contextlib import contextmanager
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
    best_single,
    block_weights,
    earned_unselected,
    first_best,
    judged_folds,
    judged_groups,
    rewards_by_load,
)
from paceline.selection.choosers import NetworkChooser, PolicyNetwork
from paceline.selection.features import standardisation, standardise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset

    Loss = Callable[[Tensor, Tensor, "NetworkSettings", torch.Generator], Tensor]

_LEAST_GAIN: Final = 1e-3  # that counts as an improvement, in units of the rewards' spread
_STREAMS_PER_SEED: Final = 1000  # so that no two seeds share a learner's random numbers
_FINAL: Final = 100  # random stream of the final training; each fold's stream is its number
_TEMPERATURE: Final = 0.25  # of the cost-sensitive shares, in units of the rewards' spread


class NetworkSettings(LearnerSettings):
    """Options of the networks and of their training.

    samples_per_prompt: arms that `reinforce` samples. patience: epochs without an improvement after
    which training ends.
    """

    hidden_units: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0.0)
    weight_decay: float = Field(default=1e-2, ge=0.0)
    entropy_weight: float = Field(default=0.01, ge=0.0)
    samples_per_prompt: int = Field(default=4, ge=1)
    batch_size: int = Field(default=64, ge=1)
    max_epochs: int = Field(default=200, ge=1)
    patience: int = Field(default=25, ge=1)


def surrogate_loss(
    logits: Tensor, rewards: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Return a loss whose gradient estimates minus the expected reward's gradient without bias.

    logits, rewards: [B, A]; the expected reward is the mean over the batch of sum_a pi_a r_a. The
    baseline of a sample is the mean reward of the prompt's other samples (leave-one-out), or the mean
    over arms if there is no other sample. Neither depends on the sample itself, so neither adds bias.
    """
    log_probs = logits.log_softmax(dim=1)  # [B, A]
    probs = log_probs.detach().exp()
    arms = torch.multinomial(probs, num_samples, replacement=True, generator=generator)  # [B, S]
    sampled = rewards.gather(1, arms)  # [B, S]
    if num_samples > 1:
        baseline = (sampled.sum(dim=1, keepdim=True) - sampled) / (num_samples - 1)
    else:
        baseline = rewards.mean(dim=1, keepdim=True)
    return -((sampled - baseline) * log_probs.gather(1, arms)).mean()


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the policy's entropy in nats, averaged over the batch. logits: [B, A]."""
    log_probs = logits.log_softmax(dim=1)
    return -(log_probs.exp() * log_probs).sum(dim=1).mean()


def reinforce_loss(
    logits: Tensor, rewards: Tensor, settings: NetworkSettings, generator: torch.Generator
) -> Tensor:
    """Return `surrogate_loss` less the weighted entropy, which delays a one-sided policy."""
    loss = surrogate_loss(logits, rewards, settings.samples_per_prompt, generator)
    return loss - settings.entropy_weight * mean_entropy(logits)


def expected_loss(
    logits: Tensor, rewards: Tensor, settings: NetworkSettings, generator: torch.Generator
) -> Tensor:
    """Return minus the expected reward, less the weighted entropy. logits, rewards: [B, A]."""
    expected = (logits.softmax(dim=1) * rewards).sum(dim=1).mean()
    return -expected - settings.entropy_weight * mean_entropy(logits)


def cost_sensitive_loss(
    logits: Tensor, rewards: Tensor, settings: NetworkSettings, generator: torch.Generator
) -> Tensor:
    """Return the cross-entropy to softmax(rewards / temperature). logits, rewards: [B, A]."""
    shares = (rewards / _TEMPERATURE).softmax(dim=1)
    return -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean()


LOSSES: Final[Mapping[str, Loss]] = {
    "reinforce": reinforce_loss,
    "policy_gradient": expected_loss,
    "cost_sensitive": cost_sensitive_loss,
}


class Training:
    """One network and the prompts that it trains on."""

    def __init__(
        self,
        features: np.ndarray,
        rewards: np.ndarray,
        weights: np.ndarray,
        settings: NetworkSettings,
        loss: Loss = reinforce_loss,
        stream: int = 0,
    ) -> None:
        """features: [N, F]; rewards: [L, N, A]; weights: [F], of each feature relative to the others;
        stream: the number of the training under this seed.
        """
        self._settings = settings
        self._loss = loss
        self._generator = torch.Generator().manual_seed(_STREAMS_PER_SEED * settings.seed + stream)
        self._mean, self._scale = standardisation(features)
        self._weights = weights
        # rewards that depend on no load count as those of load 1
        known = settings.loads if len(rewards) == len(settings.loads) else (1,) * len(rewards)
        loads = torch.log(torch.tensor(known, dtype=torch.float32))
        spread = float(loads.std(unbiased=False))
        self._load_mean, self._load_scale = float(loads.mean()), 1.0 / spread if spread > 0 else 0.0
        self._loads = (loads - self._load_mean) * self._load_scale  # [L] standardised
        self._inputs = self.inputs(features)  # [N, F]
        self._rewards = torch.from_numpy(_relative(rewards).astype(np.float32))  # [L, N, A]
        F, H, A = features.shape[1] + 1, settings.hidden_units, rewards.shape[2]
        self.w1 = torch.randn((F, H), generator=self._generator) / F**0.5
        self.b1 = torch.zeros(H)
        # an output layer of zeros: training starts from the uniform policy
        self.w2 = torch.zeros((H, A))
        self.b2 = torch.zeros(A)
        groups = [
            {"params": [self.w1, self.w2], "weight_decay": settings.weight_decay},
            {"params": [self.b1, self.b2], "weight_decay": 0.0},
        ]
        for parameter in (self.w1, self.b1, self.w2, self.b2):
            parameter.requires_grad_()
        self._optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)

    def inputs(self, features: np.ndarray) -> Tensor:
        """Return features [N, F] as this network reads them."""
        return torch.from_numpy(standardise(features, self._mean, self._scale) * self._weights)

    def logits(self, inputs: Tensor, loads: Tensor) -> Tensor:
        """Return [B, A] for inputs [B, F] from `inputs`. loads: [B] places in the settings' loads."""
        first = inputs @ self.w1[:-1] + self._loads[loads, None] * self.w1[-1]
        return torch.tanh(first + self.b1) @ self.w2 + self.b2

    def epoch(self) -> None:
        """Pass over the prompts once in random order, each under a load drawn at random."""
        order = torch.randperm(len(self._inputs), generator=self._generator)
        loads = torch.randint(len(self._rewards), order.shape, generator=self._generator)
        for batch in torch.split(order, self._settings.batch_size):
            logits = self.logits(self._inputs[batch], loads[batch])
            rewards = self._rewards[loads[batch], batch]
            loss = self._loss(logits, rewards, self._settings, self._generator)
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()

    @torch.no_grad()
    def probabilities(self, inputs: Tensor) -> np.ndarray:
        """Return [L, N, A] for inputs [N, F] from `inputs`."""
        count = torch.ones(len(inputs), dtype=torch.int64)
        distributions = [
            self.logits(inputs, load * count).softmax(dim=1) for load in range(len(self._loads))
        ]
        return np.asarray(torch.stack(distributions).numpy())

    @torch.no_grad()
    def network(self) -> PolicyNetwork:
        """Return the network for serving. The features' weights become part of its first layer."""
        return PolicyNetwork(
            mean=np.append(self._mean, np.float32(self._load_mean)),
            scale=np.append(self._scale, np.float32(self._load_scale)),
            w1=self.w1.numpy() * np.append(self._weights, np.float32(1.0))[:, None],
            b1=self.b1.numpy().copy(),
            w2=self.w2.numpy().copy(),
            b2=self.b2.numpy().copy(),
        )


def _relative(rewards: np.ndarray) -> np.ndarray:
    """Return rewards less their prompt's mean, in units of their spread, so that no setting depends on
    their scale.
    """
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred**2).mean())
    return np.asarray(centred / spread if spread > 0 else centred)


@dataclass(slots=True)
class _Fold:
    training: Training
    inputs: Tensor  # [n, F]
    rewards: np.ndarray  # [L, n, A]

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (score, greedy reward) of each prompt, [n] each, averaged over the loads.

        The greedy reward is that of the arm that serving would take, but it moves in steps when prompts
        are few. The score is the mean of it and of the expected reward, which is smooth.
        """
        distribution = self.training.probabilities(self.inputs)  # [L, n, A]
        expected = (distribution * self.rewards).sum(axis=2)
        best = distribution.argmax(axis=2)[..., None]
        greedy = np.take_along_axis(self.rewards, best, axis=2)[..., 0]
        return ((greedy + expected) / 2).mean(axis=0), greedy.mean(axis=0)


class NetworkLearner(Learner[NetworkSettings]):
    """Trains by one of `LOSSES`.

    Cross-validation finds the number of epochs and the gain over the best single arm. If the gain is
    larger than its standard error, the network is then trained on all prompts; otherwise the chooser
    is that arm (by load).
    """

    Settings = NetworkSettings
    chooser = NetworkChooser
    search_space: ClassVar = {
        "hidden_units": (16, 128),
        "learning_rate": (1e-3, 2e-2),
        "weight_decay": (1e-3, 0.3),
        "entropy_weight": (1e-3, 0.1),
    }
    fits_choices = True

    def __init__(self, loss: str) -> None:
        self.name = loss
        self._loss = LOSSES[loss]

    def fit(self, data: Dataset, settings: NetworkSettings, on_progress: Progress) -> Fitted:
        rewards = rewards_by_load(data, settings)
        weights = block_weights(data.spans, data.features.shape[1])
        with one_thread():
            judged = self._cross_validate(data, rewards, weights, settings, on_progress)
            found = {"num_epochs": judged.num_epochs}
            summary = Summary.judged(len(data), judged.earned, judged.single, found)
            if summary.constant:
                return Fitted(best_single(data, rewards, settings), summary, judged.curve)
            final = Training(data.features, rewards, weights, settings, self._loss, _FINAL)
            for done in range(judged.num_epochs):
                final.epoch()
                on_progress("training", done + 1, judged.num_epochs)
        return Fitted(NetworkChooser(data.arms, [final.network()]), summary, judged.curve)

    def _cross_validate(
        self,
        data: Dataset,
        rewards: np.ndarray,
        weights: np.ndarray,
        settings: NetworkSettings,
        on_progress: Progress,
    ) -> _Judged:
        folds = self._make_folds(data, rewards, weights, settings)
        least_gain = _LEAST_GAIN * float((rewards - rewards.mean(axis=2, keepdims=True)).std())
        # the arm that is best in hindsight, which a policy must beat
        best = rewards.mean(axis=1).argmax(axis=1)  # [L]
        single = [fold.rewards[np.arange(len(best)), :, best].mean(axis=0) for fold in folds]
        judged = _Judged(0, np.zeros(1), np.concatenate(single), Curve("epochs"))
        epoch = 0
        all_scores: list[np.ndarray] = []  # [n] by epoch
        all_earned: list[np.ndarray] = []
        means: list[float] = []
        while epoch < settings.max_epochs and epoch - judged.num_epochs < settings.patience:
            epoch += 1
            scores, earned = [], []
            for fold in folds:
                fold.training.epoch()
                score_of_fold, greedy = fold.judge()
                scores.append(score_of_fold)
                earned.append(greedy)
            all_scores.append(np.concatenate(scores))
            means.append(float(all_scores[-1].mean()))
            all_earned.append(np.concatenate(earned))
            judged.num_epochs = 1 + first_best(np.array(means), least_gain)
            on_progress("cross-validation", epoch, settings.max_epochs)
        on_progress("cross-validation", epoch, epoch)
        judged.earned = earned_unselected(
            np.stack(all_earned),
            np.stack(all_scores),
            judged_groups(data, settings.seed),
            lambda means: first_best(means, least_gain),
        )
        points = tuple((float(i + 1), float(own.mean())) for i, own in enumerate(all_earned))
        judged.curve = Curve("epochs", points)
        return judged

    def _make_folds(
        self, data: Dataset, rewards: np.ndarray, weights: np.ndarray, settings: NetworkSettings
    ) -> list[_Fold]:
        folds = []
        for i, (rest, own) in enumerate(judged_folds(data, settings.seed)):
            training = Training(
                data.features[rest], rewards[:, rest], weights, settings, self._loss, stream=i
            )
            folds.append(_Fold(training, training.inputs(data.features[own]), rewards[:, own]))
        return folds


@dataclass(slots=True)
class _Judged:
    """The best epoch, and the rewards on prompts not learned from."""

    num_epochs: int
    earned: np.ndarray  # [n] at the epoch that is best on other prompts
    single: np.ndarray  # [n] of the best single arm
    curve: Curve


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: small products are faster so, and their bits do not depend on threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
