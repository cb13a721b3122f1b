"""REINFORCE: an unbiased gradient, and policies that learn what there is to learn and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from paceline.learning.reinforce import Learner, mean_entropy, surrogate_loss, train

from paceline.config import LearningSection

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.selection.network import PolicyNetwork
    from torch import Tensor

    Estimator = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]

LOGITS = torch.tensor([[0.3, -0.8, 1.1], [0.0, 2.0, -0.5]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 3.0, 0.5], [2.0, 2.5, 4.0]], dtype=torch.float64)
NUM_DRAWS = 100_000


def exact_gradient() -> Tensor:
    """The gradient of the mean over the batch of sum_a pi_a r_a, written out."""
    probs = LOGITS.softmax(dim=1)
    expected = (probs * REWARDS).sum(dim=1, keepdim=True)
    return probs * (REWARDS - expected) / len(LOGITS)


def sampled_gradients(estimator: Estimator, num_samples: int) -> Tensor:
    """[draws, B, A]: the batch is repeated, since its rows are sampled independently."""
    logits = LOGITS.repeat(NUM_DRAWS, 1).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    loss = estimator(logits, REWARDS.repeat(NUM_DRAWS, 1), num_samples, generator)
    (gradient,) = torch.autograd.grad(-loss, logits)
    return gradient.reshape(NUM_DRAWS, *LOGITS.shape) * NUM_DRAWS


def largest_deviation(estimator: Estimator, num_samples: int) -> float:
    """Of the mean sampled gradient from the exact one, in standard errors."""
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


def reward_of(network: PolicyNetwork, features: np.ndarray, rewards: np.ndarray) -> float:
    chosen = network.logits(features).argmax(axis=1)
    return float(rewards[np.arange(len(rewards)), chosen].mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_four_clusters_are_learned_from_thirty_prompts_each(clusters: Callable, seed: int) -> None:
    seen, unseen = clusters(seed)

    network, summary = train(seen.features, seen.rewards, LearningSection(seed=seed))

    oracle = unseen.rewards.max(axis=1).mean()
    single = unseen.rewards[:, seen.rewards.mean(axis=0).argmax()].mean()
    assert single < 0.75 * oracle
    assert reward_of(network, unseen.features, unseen.rewards) >= 0.97 * oracle
    assert not summary.constant
    assert summary.num_validation == summary.num_prompts == 120
    assert summary.gain > 10 * summary.gain_error


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_features_teach_no_more_than_the_best_arm(clusters: Callable, seed: int) -> None:
    """One arm is a little better on the whole, so that a policy that believed in noise would lose."""
    seen, unseen = clusters(seed)
    rng = np.random.default_rng(seed)
    for part in (seen, unseen):
        part.rewards[:, 3] += 0.1
        rng.shuffle(part.features)

    network, _ = train(seen.features, seen.rewards, LearningSection(seed=seed))

    single = unseen.rewards[:, 3].mean()
    assert reward_of(network, unseen.features, unseen.rewards) == pytest.approx(single, rel=0.02)


def test_pure_noise_ends_in_the_best_arm() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 100)).astype(np.float32)
    rewards = np.array([1.0, 1.3, 1.25, 1.2]) + 0.2 * rng.normal(size=(120, 4))

    network, summary = train(features, rewards, LearningSection())

    assert summary.constant
    assert summary.num_epochs == 0
    assert (network.logits(features).argmax(axis=1) == rewards.mean(axis=0).argmax()).all()


def test_one_statistic_is_heard_among_hundreds_of_hidden_units() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(420, 774)).astype(np.float32)
    overlap = features[:, -4]
    rewards = np.stack([np.ones(420), 1.0 + 0.3 * overlap], axis=1)
    rewards += 0.05 * rng.normal(size=rewards.shape)

    network, _ = train(features[:120], rewards[:120], LearningSection())

    chosen = network.logits(features[120:]).argmax(axis=1)
    assert (chosen == (overlap[120:] > 0)).mean() > 0.75


def test_training_repeats_itself_exactly_and_the_seed_matters(clusters: Callable) -> None:
    seen, _ = clusters(0, 10)
    settings = LearningSection(max_epochs=25)

    def weights(seed: int) -> np.ndarray:
        rng = torch.random.get_rng_state()
        network, _ = train(seen.features, seen.rewards, settings.model_copy(update={"seed": seed}))
        assert torch.equal(torch.random.get_rng_state(), rng)  # no global generator is used
        return network.w1

    assert np.array_equal(weights(0), weights(0))
    assert not np.array_equal(weights(0), weights(1))


def test_neither_scale_nor_offset_of_rewards_matters(clusters: Callable) -> None:
    """An offset by prompt: a hard prompt is slow with every arm, which says nothing about arms."""
    seen, _ = clusters(0, 10)
    hard = np.random.default_rng(0).uniform(0, 1, size=(len(seen.rewards), 1))
    settings = LearningSection(max_epochs=25)

    plain, _ = train(seen.features, seen.rewards, settings)
    changed, summary = train(seen.features, 1024.0 * (seen.rewards + hard), settings)

    assert not summary.constant
    assert changed.w1 == pytest.approx(plain.w1, abs=1e-3)


def test_what_is_served_is_what_was_trained(clusters: Callable) -> None:
    """The network for serving folds the blocks' weights in; its logits are the learner's."""
    seen, _ = clusters(0, 10)
    learner = Learner(seen.features, seen.rewards, LearningSection(), stream=0)
    for _ in range(3):
        learner.epoch()

    expected = learner.logits(learner.inputs(seen.features)).detach().numpy()
    assert learner.network().logits(seen.features) == pytest.approx(expected, abs=1e-4)


def test_a_constant_feature_is_left_out(clusters: Callable) -> None:
    seen, _ = clusters(0, 10)
    seen.features[:, -1] = 0.3

    network, _ = train(seen.features, seen.rewards, LearningSection(max_epochs=2))

    assert network.scale[-1] == 0.0
    assert (network.scale[:-1] > 0).all()


def test_entropy_keeps_the_policy_open(clusters: Callable) -> None:
    seen, _ = clusters(0, 10)

    def entropy(weight: float) -> float:
        settings = LearningSection(entropy_weight=weight)
        learner = Learner(seen.features, seen.rewards, settings, stream=0)
        for _ in range(100):
            learner.epoch()
        return float(mean_entropy(learner.logits(learner.inputs(seen.features)).detach()))

    assert entropy(0.0) < 0.5 * entropy(0.5)


def test_progress_counts_epochs_and_ends_full(clusters: Callable) -> None:
    seen, _ = clusters(0, 10)
    calls: list[tuple[str, int, int]] = []
    threads = torch.get_num_threads()

    _, summary = train(
        seen.features,
        seen.rewards,
        LearningSection(max_epochs=25),
        on_progress=lambda *call: calls.append(call),
    )

    assert calls[0] == ("cross-validation", 1, 25)
    assert calls[-1] == ("training", summary.num_epochs, summary.num_epochs)
    last = {stage: (done, total) for stage, done, total in calls}
    assert all(done == total for done, total in last.values())
    assert torch.get_num_threads() == threads


def test_many_prompts_are_judged_on_one_fold() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1200, 12)).astype(np.float32)
    rewards = np.stack([features[:, 0], -features[:, 0]], axis=1)

    network, summary = train(features, rewards, LearningSection(max_epochs=10))

    assert summary.num_validation == 240
    assert reward_of(network, features, rewards) > 0.95 * np.abs(features[:, 0]).mean()
