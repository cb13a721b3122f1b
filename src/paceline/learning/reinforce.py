"""REINFORCE on full-information offline rewards: sample arms, centre their rewards, climb.

The training method of arXiv 2408.08470 (policy gradient on an offline set in which every arm is
scored for every prompt). Its baseline, optimiser, network and settings are not confirmed; these are
ours. Knows no arm by name and no seconds. Symbols: N prompts, B of them in a minibatch, F features,
H hidden units, A arms, S samples a prompt.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from paceline.selection.features import STATISTICS
from paceline.selection.network import PolicyNetwork, standardise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from paceline.config import LearningSection

    Progress = Callable[[str, int, int], None]

NUM_FOLDS: Final = 5
_CROSS_VALIDATE_UP_TO: Final = 1000  # prompts; beyond, one fold is large enough to judge by
_ENOUGH: Final = 1e-3  # of the rewards' spread: what counts as an improvement
_SEEDS_APART: Final = 1000  # so that no two seeds share a learner's random numbers


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """How training went. `gain` is the mean reward over the best single arm's on prompts that the
    networks judged had not seen, `gain_error` its standard error.
    """

    num_prompts: int
    num_validation: int  # prompts that decided when to stop
    num_epochs: int
    gain: float
    gain_error: float
    constant: bool  # the policy is the best single arm, because the gain was not distinct from 0


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


class Learner:
    """One network in training on its own prompts."""

    def __init__(
        self, features: np.ndarray, rewards: np.ndarray, settings: LearningSection, stream: int
    ) -> None:
        """features: [N, F]; rewards: [N, A]; stream: tells apart the learners of one seed."""
        self._settings = settings
        self._generator = torch.Generator().manual_seed(_SEEDS_APART * settings.seed + stream)
        self._mean, self._scale = _standardisation(features)
        self._weights = _block_weights(features.shape[1])
        self._inputs = self.inputs(features)  # [N, F]
        self._rewards = torch.from_numpy(_relative(rewards).astype(np.float32))  # [N, A]
        F, H, A = features.shape[1], settings.hidden_units, rewards.shape[1]
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

    def logits(self, inputs: Tensor) -> Tensor:
        """[N, A] for inputs [N, F] from `inputs`."""
        return torch.tanh(inputs @ self.w1 + self.b1) @ self.w2 + self.b2

    def epoch(self) -> None:
        """One pass over the prompts in random order."""
        settings = self._settings
        order = torch.randperm(len(self._inputs), generator=self._generator)
        for batch in torch.split(order, settings.batch_size):
            logits = self.logits(self._inputs[batch])
            rewards = self._rewards[batch]
            loss = surrogate_loss(logits, rewards, settings.samples_per_prompt, self._generator)
            loss = loss - settings.entropy_weight * mean_entropy(logits)
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()

    @torch.no_grad()
    def probabilities(self, inputs: Tensor) -> np.ndarray:
        """[N, A] for inputs [N, F] from `inputs`."""
        return np.asarray(self.logits(inputs).softmax(dim=1).numpy())

    @torch.no_grad()
    def always(self, arm: int) -> None:
        """Forget what was learned: one arm, whatever the prompt."""
        for parameter in (self.w1, self.b1, self.w2, self.b2):
            parameter.zero_()
        self.b2[arm] = 1.0

    @torch.no_grad()
    def network(self) -> PolicyNetwork:
        """As served: the blocks' weights become part of the first layer."""
        return PolicyNetwork(
            mean=self._mean,
            scale=self._scale,
            w1=self.w1.numpy() * self._weights[:, None],
            b1=self.b1.numpy().copy(),
            w2=self.w2.numpy().copy(),
            b2=self.b2.numpy().copy(),
        )


def _block_weights(num_features: int) -> np.ndarray:
    """[F] float32: the hidden states together weigh as much as one statistic.

    Otherwise what a statistic says (that a prompt repeats itself, say) drowns in hundreds of hidden
    units, which fit a few hundred prompts in countless ways.
    """
    weights = np.ones(num_features, dtype=np.float32)
    num_hidden = num_features - len(STATISTICS)
    if num_hidden > 0:
        weights[:num_hidden] = num_hidden**-0.5
    return weights


def _standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, scale) [F] float32; a feature that does not vary gets the scale 0."""
    mean = features.mean(axis=0, dtype=np.float64)
    std = features.std(axis=0, dtype=np.float64)
    varies = std > 1e-6 * (1.0 + np.abs(mean))
    scale = np.where(varies, 1.0 / np.where(varies, std, 1.0), 0.0)
    return mean.astype(np.float32), scale.astype(np.float32)


def _relative(rewards: np.ndarray) -> np.ndarray:
    """Rewards less their prompt's mean, in units of their spread: no setting depends on a scale."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    spread = np.sqrt((centred**2).mean())
    return np.asarray(centred / spread if spread > 0 else centred)


@dataclass(slots=True)
class _Fold:
    """A network, and the prompts that it does not learn from."""

    learner: Learner
    inputs: Tensor  # [n, F]
    rewards: np.ndarray  # [n, A]

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        """(score, greedy reward) [n] of each prompt.

        The greedy reward is what serving gets, but moves in steps when prompts are few; half of the
        score is the expected reward, which is smooth.
        """
        probabilities = self.learner.probabilities(self.inputs)
        expected = (probabilities * self.rewards).sum(axis=1)
        greedy = self.rewards[np.arange(len(self.rewards)), probabilities.argmax(axis=1)]
        return (greedy + expected) / 2, greedy


def train(
    features: np.ndarray,
    rewards: np.ndarray,
    settings: LearningSection,
    on_progress: Progress = lambda stage, done, total: None,
) -> tuple[PolicyNetwork, TrainingSummary]:
    """A network from features [N, F] and rewards [N, A]; deterministic in the settings' seed.

    Cross-validation finds for how many epochs to train and whether there is anything to learn; the
    network is then trained on all prompts. Unless its gain over the best single arm is larger than
    the gain's standard error, the policy is that arm. on_progress: stage, epochs, of how many.
    """
    with _one_thread():
        num_epochs, gain = _cross_validate(features, rewards, settings, on_progress)
        error = float(gain.std() / np.sqrt(len(gain)))
        constant = bool(gain.mean() <= error)
        final = Learner(features, rewards, settings, stream=NUM_FOLDS)
        if constant:
            final.always(int(rewards.mean(axis=0).argmax()))
            num_epochs = 0
        for done in range(num_epochs):
            final.epoch()
            on_progress("training", done + 1, num_epochs)
    summary = TrainingSummary(
        num_prompts=len(rewards),
        num_validation=len(gain),
        num_epochs=num_epochs,
        gain=float(gain.mean()),
        gain_error=error,
        constant=constant,
    )
    return final.network(), summary


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small are slower on several threads, and the bits would depend on how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cross_validate(
    features: np.ndarray, rewards: np.ndarray, settings: LearningSection, on_progress: Progress
) -> tuple[int, np.ndarray]:
    """(best number of epochs, gain over the best single arm there of each validation prompt)."""
    folds = _make_folds(features, rewards, settings)
    # the arm that is best in hindsight: a policy must be worth more than that to be believed
    single = np.concatenate([fold.rewards[:, rewards.mean(axis=0).argmax()] for fold in folds])
    enough = _ENOUGH * float((rewards - rewards.mean(axis=1, keepdims=True)).std())
    best_score, best_epoch, gain = -np.inf, 0, np.zeros(1)
    epoch = 0
    while epoch < settings.max_epochs and epoch - best_epoch < settings.patience:
        epoch += 1
        judged = []
        for fold in folds:
            fold.learner.epoch()
            judged.append(fold.judge())
        score = float(np.concatenate([s for s, _ in judged]).mean())
        if score > best_score + enough:
            best_score, best_epoch = score, epoch
            gain = np.concatenate([greedy for _, greedy in judged]) - single
        on_progress("cross-validation", epoch, settings.max_epochs)
    on_progress("cross-validation", epoch, epoch)
    return best_epoch, gain


def _make_folds(
    features: np.ndarray, rewards: np.ndarray, settings: LearningSection
) -> list[_Fold]:
    order = np.random.default_rng([settings.seed, NUM_FOLDS + 1]).permutation(len(rewards))
    number = np.empty(len(rewards), dtype=np.int64)
    number[order] = np.arange(len(rewards)) % NUM_FOLDS
    folds = []
    for i in range(NUM_FOLDS if len(rewards) <= _CROSS_VALIDATE_UP_TO else 1):
        rest, own = number != i, number == i
        learner = Learner(features[rest], rewards[rest], settings, stream=i)
        folds.append(_Fold(learner, learner.inputs(features[own]), rewards[own]))
    return folds
