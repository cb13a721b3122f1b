"""Networks that rank arms, trained on full-information offline rewards by three losses.

`reinforce` samples arms, centres their rewards and climbs: the training method of arXiv 2408.08470
(policy gradient on an offline set in which every arm is scored for every prompt). Its baseline,
optimiser, network and settings are not confirmed; these are ours. As every arm is scored,
`policy_gradient` climbs the expected reward itself, without sampling; `cost_sensitive` learns by
cross-entropy to give each arm a share that falls with its regret. Rewards depend on the load, so
each prompt is met under loads drawn anew. Symbols: N prompts, B of them in a minibatch, F features,
H hidden units, A arms, L loads, S samples a prompt.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from paceline.learning.learners.base import (
    Curve,
    Fitted,
    Learner,
    Summary,
    fold_numbers,
    num_folds,
    rewards_by_load,
)
from paceline.learning.reduce import block_weights
from paceline.selection.choosers import FixedChooser, NetworkChooser, PolicyNetwork
from paceline.selection.scaling import standardisation, standardise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from paceline.config import LearningSection
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners.base import Progress

    Loss = Callable[[Tensor, Tensor, LearningSection, torch.Generator], Tensor]

_ENOUGH: Final = 1e-3  # of the rewards' spread: what counts as an improvement
_SEEDS_APART: Final = 1000  # so that no two seeds share a learner's random numbers
_FINAL: Final = 100  # stream of the network that is kept; the folds' are their numbers
_TEMPERATURE: Final = 0.25  # of the cost-sensitive shares, in units of the rewards' spread


def surrogate_loss(
    logits: Tensor, rewards: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    """A loss whose gradient is an unbiased estimate of minus the expected reward's gradient.

    logits, rewards: [B, A]; the expected reward is the mean over the batch of sum_a pi_a r_a. The
    baseline of a sample is the mean reward of the prompt's other samples (leave-one-out); of a lone
    sample, the mean over arms. Neither looks at the sample itself, so no bias comes in.
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
    """The policy's entropy in nats, averaged over the batch. logits: [B, A]."""
    log_probs = logits.log_softmax(dim=1)
    return -(log_probs.exp() * log_probs).sum(dim=1).mean()


def reinforce_loss(
    logits: Tensor, rewards: Tensor, settings: LearningSection, generator: torch.Generator
) -> Tensor:
    """`surrogate_loss`, less the entropy that keeps the policy from settling early."""
    loss = surrogate_loss(logits, rewards, settings.samples_per_prompt, generator)
    return loss - settings.entropy_weight * mean_entropy(logits)


def expected_loss(
    logits: Tensor, rewards: Tensor, settings: LearningSection, generator: torch.Generator
) -> Tensor:
    """Minus the expected reward itself, less the entropy. logits, rewards: [B, A]."""
    expected = (logits.softmax(dim=1) * rewards).sum(dim=1).mean()
    return -expected - settings.entropy_weight * mean_entropy(logits)


def cost_sensitive_loss(
    logits: Tensor, rewards: Tensor, settings: LearningSection, generator: torch.Generator
) -> Tensor:
    """Cross-entropy against softmax(rewards / temperature). logits, rewards: [B, A]."""
    shares = (rewards / _TEMPERATURE).softmax(dim=1)
    return -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean()


LOSSES: Final[Mapping[str, Loss]] = {
    "reinforce": reinforce_loss,
    "policy_gradient": expected_loss,
    "cost_sensitive": cost_sensitive_loss,
}


class Training:
    """One network in training on its own prompts."""

    def __init__(
        self,
        features: np.ndarray,
        rewards: np.ndarray,
        weights: np.ndarray,
        settings: LearningSection,
        loss: Loss = reinforce_loss,
        stream: int = 0,
    ) -> None:
        """features: [N, F]; rewards: [L, N, A]; weights: [F], of each feature beside the others;
        stream: tells apart the trainings of one seed.
        """
        self._settings = settings
        self._loss = loss
        self._generator = torch.Generator().manual_seed(_SEEDS_APART * settings.seed + stream)
        self._mean, self._scale = standardisation(features)
        self._weights = weights
        self._loads = _log_loads(settings, len(rewards))  # [L]
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
        """[N, F] as this network reads them."""
        return torch.from_numpy(standardise(features, self._mean, self._scale) * self._weights)

    def logits(self, inputs: Tensor, loads: Tensor) -> Tensor:
        """[B, A] for inputs [B, F] from `inputs` under loads [B], places of the settings' loads."""
        first = inputs @ self.w1[:-1] + self._standard_loads()[loads, None] * self.w1[-1]
        return torch.tanh(first + self.b1) @ self.w2 + self.b2

    def _standard_loads(self) -> Tensor:
        """[L] the loads as the network reads them."""
        spread = self._loads.std(unbiased=False)
        centred = self._loads - self._loads.mean()
        return centred / spread if spread > 0 else torch.zeros_like(centred)

    def epoch(self) -> None:
        """One pass over the prompts in random order, each under a load drawn at random."""
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
        """[L, N, A] for inputs [N, F] from `inputs`."""
        count = torch.ones(len(inputs), dtype=torch.int64)
        distributions = [
            self.logits(inputs, load * count).softmax(dim=1) for load in range(len(self._loads))
        ]
        return np.asarray(torch.stack(distributions).numpy())

    @torch.no_grad()
    def network(self) -> PolicyNetwork:
        """As served: the features' weights become part of the first layer."""
        spread = float(self._loads.std(unbiased=False))
        mean, scale = float(self._loads.mean()), 1.0 / spread if spread > 0 else 0.0
        return PolicyNetwork(
            mean=np.append(self._mean, np.float32(mean)),
            scale=np.append(self._scale, np.float32(scale)),
            w1=self.w1.numpy() * np.append(self._weights, np.float32(1.0))[:, None],
            b1=self.b1.numpy().copy(),
            w2=self.w2.numpy().copy(),
            b2=self.b2.numpy().copy(),
        )


def _log_loads(settings: LearningSection, num_loads: int) -> Tensor:
    """[L] logarithms of the loads; rewards that hang on no load are those of one request alone."""
    loads = settings.loads if num_loads == len(settings.loads) else (1,) * num_loads
    return torch.log(torch.tensor(loads, dtype=torch.float32))


def _relative(rewards: np.ndarray) -> np.ndarray:
    """Rewards less their prompt's mean, in units of their spread: no setting depends on a scale."""
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred**2).mean())
    return np.asarray(centred / spread if spread > 0 else centred)


@dataclass(slots=True)
class _Fold:
    """A network, and the prompts that it does not learn from."""

    training: Training
    inputs: Tensor  # [n, F]
    rewards: np.ndarray  # [L, n, A]

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        """(score, greedy reward) [n] of each prompt, over the loads.

        The greedy reward is what serving gets, but moves in steps when prompts are few; half of the
        score is the expected reward, which is smooth.
        """
        distribution = self.training.probabilities(self.inputs)  # [L, n, A]
        expected = (distribution * self.rewards).sum(axis=2)
        greedy = np.take_along_axis(self.rewards, distribution.argmax(axis=2)[..., None], axis=2)[
            ..., 0
        ]
        return ((greedy + expected) / 2).mean(axis=0), greedy.mean(axis=0)


class NetworkLearner(Learner):
    """Trains by one of `LOSSES`.

    Cross-validation finds for how many epochs to train and whether there is anything to learn; the
    network is then trained on all prompts. Unless its gain over the best single arm is larger than
    the gain's standard error, the chooser is that arm (by load).
    """

    def __init__(self, loss: str) -> None:
        self.name = loss
        self._loss = LOSSES[loss]

    def fit(self, data: Dataset, settings: LearningSection, on_progress: Progress) -> Fitted:
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
        settings: LearningSection,
        on_progress: Progress,
    ) -> _Judged:
        folds = self._make_folds(data, rewards, weights, settings)
        enough = _ENOUGH * float((rewards - rewards.mean(axis=2, keepdims=True)).std())
        # the arm that is best in hindsight: a policy must be worth more than that to be believed
        best = rewards.mean(axis=1).argmax(axis=1)  # [L]
        single = [fold.rewards[np.arange(len(best)), :, best].mean(axis=0) for fold in folds]
        judged = _Judged(0, np.zeros(1), np.concatenate(single), Curve("epochs"))
        best_score, epoch = -np.inf, 0
        points: list[tuple[float, float]] = []
        while epoch < settings.max_epochs and epoch - judged.num_epochs < settings.patience:
            epoch += 1
            scores, earned = [], []
            for fold in folds:
                fold.training.epoch()
                of_fold, greedy = fold.judge()
                scores.append(of_fold)
                earned.append(greedy)
            score = float(np.concatenate(scores).mean())
            points.append((epoch, float(np.concatenate(earned).mean())))
            if score > best_score + enough:
                best_score = score
                judged.num_epochs, judged.earned = epoch, np.concatenate(earned)
            on_progress("cross-validation", epoch, settings.max_epochs)
        on_progress("cross-validation", epoch, epoch)
        judged.curve = Curve("epochs", tuple(points))
        return judged

    def _make_folds(
        self, data: Dataset, rewards: np.ndarray, weights: np.ndarray, settings: LearningSection
    ) -> list[_Fold]:
        number = fold_numbers(data.groups, settings.seed)
        folds = []
        for i in range(num_folds(len(data))):
            rest, own = number != i, number == i
            training = Training(
                data.features[rest], rewards[:, rest], weights, settings, self._loss, stream=i
            )
            folds.append(_Fold(training, training.inputs(data.features[own]), rewards[:, own]))
        return folds


@dataclass(slots=True)
class _Judged:
    """The best epoch, what was earned at it and by the best single arm, [n] over prompts."""

    num_epochs: int
    earned: np.ndarray
    single: np.ndarray
    curve: Curve


def best_single(data: Dataset, rewards: np.ndarray, settings: LearningSection) -> FixedChooser:
    """The arm with the largest mean reward, by load. rewards: [L, N, A]."""
    loads = settings.loads if len(rewards) == len(settings.loads) else (1,)
    best = rewards.mean(axis=1).argmax(axis=1)
    return FixedChooser(
        data.arms, {rows: data.arms[a] for rows, a in zip(loads, best, strict=True)}
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Products this small are slower on several threads, and the bits would depend on how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
