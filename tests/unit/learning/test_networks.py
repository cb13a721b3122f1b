"""Networks: unbiased gradients, and choosers that learn the signal and not the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from paceline.contracts import no_progress
from paceline.learning.learners import LEARNERS, Fitted
from paceline.learning.learners.base import block_weights
from paceline.learning.learners.networks import (
    LOSSES,
    NetworkSettings,
    Training,
    expected_loss,
    mean_entropy,
    surrogate_loss,
)
from paceline.selection.choosers import FixedChooser, NetworkChooser

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from paceline.learning.dataset import Dataset
    from paceline.selection.choosers import Chooser

    Estimator = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]

LOGITS = torch.tensor([[0.3, -0.8, 1.1], [0.0, 2.0, -0.5]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 3.0, 0.5], [2.0, 2.5, 4.0]], dtype=torch.float64)
NUM_DRAWS = 100_000


def exact_gradient() -> Tensor:
    """Return the gradient of the mean over the batch of sum_a pi_a r_a, in closed form."""
    probs = LOGITS.softmax(dim=1)
    expected = (probs * REWARDS).sum(dim=1, keepdim=True)
    return probs * (REWARDS - expected) / len(LOGITS)


def sampled_gradients(estimator: Estimator, num_samples: int) -> Tensor:
    """Return gradients [draws, B, A]: the batch is repeated, its rows are sampled independently."""
    logits = LOGITS.repeat(NUM_DRAWS, 1).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    loss = estimator(logits, REWARDS.repeat(NUM_DRAWS, 1), num_samples, generator)
    (gradient,) = torch.autograd.grad(-loss, logits)
    return gradient.reshape(NUM_DRAWS, *LOGITS.shape) * NUM_DRAWS


def largest_deviation(estimator: Estimator, num_samples: int) -> float:
    """Return the largest deviation of the mean sampled gradient, in standard errors."""
    gradients = sampled_gradients(estimator, num_samples)
    error = gradients.std(dim=0) / NUM_DRAWS**0.5
    return float(((gradients.mean(dim=0) - exact_gradient()).abs() / error).max())


def with_own_sample_in_baseline(
    logits: Tensor, rewards: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    log_probs = logits.log_softmax(dim=1)
    arms = torch.multinomial(log_probs.detach().exp(), num_samples, True, generator=generator)
    sampled = rewards.gather(1, arms)
    advantage = sampled - sampled.mean(dim=1, keepdim=True)
    return -(advantage * log_probs.gather(1, arms)).mean()


def with_arms_drawn_evenly(
    logits: Tensor, rewards: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    arms = torch.randint(0, 3, (len(logits), num_samples), generator=generator)
    advantage = rewards.gather(1, arms) - rewards.mean(dim=1, keepdim=True)
    return -(advantage * logits.log_softmax(dim=1).gather(1, arms)).mean()


def with_the_wrong_sign(
    logits: Tensor, rewards: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    return -surrogate_loss(logits, rewards, num_samples, generator)


@pytest.mark.parametrize("num_samples", [1, 2, 4])
def test_the_sampled_gradient_is_unbiased(num_samples: int) -> None:
    assert largest_deviation(surrogate_loss, num_samples) < 4.5


@pytest.mark.parametrize(
    "planted", [with_own_sample_in_baseline, with_arms_drawn_evenly, with_the_wrong_sign]
)
def test_a_biased_gradient_would_be_seen(planted: Estimator) -> None:
    assert largest_deviation(planted, 4) > 10


def test_the_baseline_takes_away_variance() -> None:
    def without_baseline(
        logits: Tensor, rewards: Tensor, num_samples: int, generator: torch.Generator
    ) -> Tensor:
        log_probs = logits.log_softmax(dim=1)
        arms = torch.multinomial(log_probs.detach().exp(), num_samples, True, generator=generator)
        return -(rewards.gather(1, arms) * log_probs.gather(1, arms)).mean()

    plain = sampled_gradients(without_baseline, 4).var(dim=0).sum()
    assert sampled_gradients(surrogate_loss, 4).var(dim=0).sum() < 0.5 * plain


def test_entropy_is_largest_for_the_uniform_policy() -> None:
    assert float(mean_entropy(torch.zeros(2, 3))) == pytest.approx(np.log(3))
    assert float(mean_entropy(LOGITS)) < np.log(3)


# the alignment reward depends on no load, so the dataset's own rewards are learned
SETTINGS = NetworkSettings(reward="alignment", learner="reinforce")
ARMS = ("none", "a", "b", "c", "d")


@pytest.fixture
def fit(tabled: Callable[..., Dataset]) -> Callable[..., Fitted]:
    def run(
        features: np.ndarray, rewards: np.ndarray, name: str = "reinforce", **changes
    ) -> Fitted:
        data = tabled(ARMS[: rewards.shape[1]], features, rewards=rewards)
        settings = SETTINGS.model_copy(update={"learner": name, **changes})
        return LEARNERS[name].fit(data, settings, no_progress)

    return run


def reward_of(
    chooser: Chooser, tabled: Callable[..., Dataset], features: np.ndarray, rewards: np.ndarray
) -> float:
    data = tabled(chooser.arms, features, rewards=rewards)
    distribution = chooser.distribution(chooser.preferences(data.features, data.situation()))
    return float((distribution * rewards).sum(axis=1).mean())


def test_the_expected_loss_has_the_exact_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    settings = NetworkSettings(entropy_weight=0.0)
    loss = expected_loss(logits, REWARDS, settings, torch.Generator())
    (gradient,) = torch.autograd.grad(-loss, logits)

    assert torch.allclose(gradient, exact_gradient())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", [0])
def test_four_clusters_are_learned_from_thirty_prompts_each(
    clusters: Callable, fit: Callable[..., Fitted], tabled: Callable, seed: int, name: str
) -> None:
    seen, unseen = clusters(seed)

    fitted = fit(seen.features, seen.rewards, name, seed=seed)

    oracle = unseen.rewards.max(axis=1).mean()
    single = unseen.rewards[:, seen.rewards.mean(axis=0).argmax()].mean()
    assert single < 0.75 * oracle
    assert reward_of(fitted.chooser, tabled, unseen.features, unseen.rewards) >= 0.97 * oracle
    summary = fitted.summary
    assert not summary.constant
    assert summary.num_validation == summary.num_prompts == 120
    assert summary.gain > 10 * summary.gain_error
    epochs = [epoch for epoch, _ in fitted.curve.points]
    assert epochs == list(range(1, len(epochs) + 1))
    kept = fitted.curve.points[int(summary.settings["num_epochs"]) - 1][1]
    assert summary.score == pytest.approx(kept, rel=0.02)  # judged at an epoch that others chose


@pytest.mark.parametrize("seed", range(2))
def test_shuffled_features_teach_no_more_than_the_best_arm(
    clusters: Callable, fit: Callable[..., Fitted], tabled: Callable, seed: int
) -> None:
    """One arm is a little better on average, so that a policy fitted to noise would lose."""
    seen, unseen = clusters(seed)
    rng = np.random.default_rng(seed)
    for part in (seen, unseen):
        part.rewards[:, 3] += 0.1
        rng.shuffle(part.features)

    fitted = fit(seen.features, seen.rewards, seed=seed)

    found = reward_of(fitted.chooser, tabled, unseen.features, unseen.rewards)
    assert found == pytest.approx(unseen.rewards[:, 3].mean(), rel=0.02)


def test_pure_noise_ends_in_the_best_arm(fit: Callable[..., Fitted]) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 100)).astype(np.float32)
    rewards = np.array([1.0, 1.3, 1.25, 1.2]) + 0.2 * rng.normal(size=(120, 4))

    fitted = fit(features, rewards)

    assert fitted.summary.constant
    assert isinstance(fitted.chooser, FixedChooser)
    assert fitted.chooser.at(1) == ARMS[rewards.mean(axis=0).argmax()]


def test_one_statistic_is_heard_among_hundreds_of_hidden_units(
    fit: Callable[..., Fitted], tabled: Callable
) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(420, 774)).astype(np.float32)
    overlap = features[:, -4]
    rewards = np.stack([np.ones(420), 1.0 + 0.3 * overlap], axis=1)
    rewards += 0.05 * rng.normal(size=rewards.shape)

    chooser = fit(features[:120], rewards[:120]).chooser

    data = tabled(ARMS[:2], features[120:])
    chosen = chooser.preferences(data.features, data.situation()).argmax(axis=1)
    assert (chosen == (overlap[120:] > 0)).mean() > 0.75


def test_the_load_is_heard(clusters: Callable, tabled: Callable) -> None:
    """The best arm with 1 row in flight is the worst with 16, on every prompt: the load must decide."""
    seen, _ = clusters(0, 10)
    settings = NetworkSettings(loads=(1, 16))
    alone = np.tile([1.0, 2.0, 1.0, 1.0, 1.0], (len(seen.features), 1))
    crowded = np.tile([1.0, 0.5, 0.6, 0.7, 0.8], (len(seen.features), 1))
    weights = block_weights({"hidden": slice(0, 768)}, seen.features.shape[1])
    training = Training(seen.features, np.stack([alone, crowded]), weights, settings)
    for _ in range(200):
        training.epoch()
    chooser = NetworkChooser(ARMS, [training.network()])
    data = tabled(ARMS, seen.features)

    by_load = [chooser.preferences(data.features, data.situation(rows)) for rows in (1, 16)]

    assert (by_load[0].argmax(axis=1) == 1).all()
    assert (by_load[1].argmax(axis=1) == 0).all()


def test_training_repeats_itself_exactly_and_the_seed_matters(
    clusters: Callable, fit: Callable[..., Fitted]
) -> None:
    seen, _ = clusters(0, 10)

    def weights(seed: int) -> np.ndarray:
        rng = torch.random.get_rng_state()
        chooser = fit(seen.features, seen.rewards, max_epochs=25, seed=seed).chooser
        assert torch.equal(torch.random.get_rng_state(), rng)  # no global generator is used
        return chooser.arrays()["0.w1"]

    assert np.array_equal(weights(0), weights(0))
    assert not np.array_equal(weights(0), weights(1))


def test_neither_scale_nor_offset_of_rewards_matters(
    clusters: Callable, fit: Callable[..., Fitted]
) -> None:
    """An offset per prompt does not matter: a hard prompt is slow with every arm."""
    seen, _ = clusters(0, 10)
    hard = np.random.default_rng(0).uniform(0, 1, size=(len(seen.rewards), 1))

    plain = fit(seen.features, seen.rewards, max_epochs=25)
    changed = fit(seen.features, 1024.0 * (seen.rewards + hard), max_epochs=25)

    assert not changed.summary.constant
    first = plain.chooser.arrays()["0.w1"]
    assert changed.chooser.arrays()["0.w1"] == pytest.approx(first, abs=1e-3)


def trained(features: np.ndarray, rewards: np.ndarray, epochs: int, **changes: object) -> Training:
    settings = SETTINGS.model_copy(update=changes)
    weights = block_weights({"hidden": slice(0, 768)}, features.shape[1])
    training = Training(features, rewards[None], weights, settings)
    for _ in range(epochs):
        training.epoch()
    return training


def test_what_is_served_is_what_was_trained(clusters: Callable) -> None:
    """The network for serving, which contains the blocks' weights, has the training's logits."""
    seen, _ = clusters(0, 10)
    training = trained(seen.features, seen.rewards, 3)

    expected = training.probabilities(training.inputs(seen.features))[0]
    chooser = NetworkChooser(ARMS, [training.network()])
    served = chooser.networks[0].logits(
        np.hstack([seen.features, np.zeros((len(seen.features), 1), dtype=np.float32)])
    )
    assert chooser.scores(served) == pytest.approx(expected, abs=1e-4)


def test_a_constant_feature_is_left_out(clusters: Callable) -> None:
    seen, _ = clusters(0, 10)
    seen.features[:, -1] = 0.3

    network = trained(seen.features, seen.rewards, 2).network()

    assert network.scale[-2] == 0.0
    assert (network.scale[:-2] > 0).all()


def test_entropy_keeps_the_policy_open(clusters: Callable) -> None:
    seen, _ = clusters(0, 10)

    def entropy(weight: float) -> float:
        training = trained(seen.features, seen.rewards, 100, entropy_weight=weight)
        distribution = training.probabilities(training.inputs(seen.features))[0]
        return float(mean_entropy(torch.from_numpy(np.log(distribution))))

    assert entropy(0.0) < 0.5 * entropy(0.5)


def test_progress_counts_epochs_and_ends_full(clusters: Callable, tabled: Callable) -> None:
    seen, _ = clusters(0, 10)
    calls: list[tuple[str, int, int]] = []
    threads = torch.get_num_threads()
    data = tabled(ARMS, seen.features, rewards=seen.rewards)
    settings = SETTINGS.model_copy(update={"max_epochs": 25})

    fitted = LEARNERS["reinforce"].fit(data, settings, lambda *call: calls.append(call))

    num_epochs = fitted.summary.settings["num_epochs"]
    assert calls[0] == ("cross-validation", 1, 25)
    assert calls[-1] == ("training", num_epochs, num_epochs)
    last = {stage: (done, total) for stage, done, total in calls}
    assert all(done == total for done, total in last.values())
    assert torch.get_num_threads() == threads


def test_many_prompts_are_judged_on_one_fold(fit: Callable[..., Fitted], tabled: Callable) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1200, 12)).astype(np.float32)
    rewards = np.stack([features[:, 0], -features[:, 0]], axis=1)

    fitted = fit(features, rewards, max_epochs=10)

    assert fitted.summary.num_validation == 240
    found = reward_of(fitted.chooser, tabled, features, rewards)
    assert found > 0.95 * np.abs(features[:, 0]).mean()
