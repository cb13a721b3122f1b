"""What every learner is: a dataset in, a chooser out; and how they judge themselves.

A learner sees the training part only. It holds some of that out again, prompt by prompt, to find
its own settings and whether what it learned beats the best single arm. Symbols: N prompts, A arms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.selection.choosers import PortableChooser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.config import LearningSection
    from paceline.learning.dataset import Dataset
    from paceline.selection.choosers import Chooser

Progress = Callable[[str, int, int], None]  # stage, done, of how many
NUM_FOLDS: Final = 5
CROSS_VALIDATE_UP_TO: Final = 1000  # prompts; beyond, one fold is large enough to judge by


@dataclass(frozen=True, slots=True)
class Summary:
    """How learning went, judged on prompts of the training part that were not learned from.

    score: the mean reward there, over the trained loads. gain: how much more it is than the best
    single arm's, `gain_error` its standard error. constant: the chooser is the best single arm,
    because the gain was not distinct from 0. settings: what the learner found for itself.
    """

    num_prompts: int
    num_validation: int
    score: float
    gain: float
    gain_error: float
    constant: bool
    settings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def judged(
        cls,
        num_prompts: int,
        earned: np.ndarray,
        single: np.ndarray,
        settings: Mapping[str, float] | None = None,
    ) -> Summary:
        """From the rewards [n] on prompts not learned from, and the best single arm's there."""
        gain, error = gain_over_single(earned, single)
        return cls(
            num_prompts=num_prompts,
            num_validation=len(earned),
            score=float(np.nanmean(earned)),
            gain=gain,
            gain_error=error,
            constant=bool(gain <= error),
            settings=dict(settings or {}),
        )


@dataclass(frozen=True, slots=True)
class Curve:
    """A learning curve: the score on prompts not learned from, by what `label` counts."""

    label: str
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a learner made."""

    chooser: Chooser
    summary: Summary
    curve: Curve


class Learner(ABC):
    """One way to learn; all of them are in `LEARNERS`."""

    name: str

    @abstractmethod
    def fit(self, data: Dataset, settings: LearningSection, on_progress: Progress) -> Fitted:
        """Learn from the training part; deterministic in the settings' seed."""


def fold_numbers(groups: Sequence[str], seed: int) -> np.ndarray:
    """[N] int: the fold of each row, 0 to NUM_FOLDS - 1; rows of one prompt share it."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    order = np.random.default_rng([seed, NUM_FOLDS + 1]).permutation(len(names))
    number = np.empty(len(names), dtype=np.int64)
    number[order] = np.arange(len(names)) % NUM_FOLDS
    return np.asarray(number[group])


def num_folds(num_prompts: int) -> int:
    """How many of the folds are judged on."""
    return NUM_FOLDS if num_prompts <= CROSS_VALIDATE_UP_TO else 1


def rewards_by_load(data: Dataset, settings: LearningSection) -> np.ndarray:
    """[L, N, A] rewards with each of the settings' loads in flight; L is 1 where they hang on none."""
    if settings.reward != "speed":
        return data.rewards[None]
    return np.stack([data.rewards_for(rows) for rows in settings.loads])


def gain_over_single(earned: np.ndarray, single: np.ndarray) -> tuple[float, float]:
    """(mean, its standard error) of the difference over prompts. earned, single: [n] rewards.

    Where only some arms were tried a reward may not be a number; then the means of those known are
    compared.
    """
    known = np.isfinite(earned), np.isfinite(single)
    if all(mask.all() for mask in known):
        gain = earned - single
        return float(gain.mean()), float(gain.std() / np.sqrt(max(len(gain), 1)))
    parts = [values[mask] for values, mask in zip((earned, single), known, strict=True)]
    if not all(map(len, parts)):
        return 0.0, float("inf")
    error = sum(float(part.var()) / len(part) for part in parts) ** 0.5
    return float(parts[0].mean() - parts[1].mean()), error


def cross_validate(
    data: Dataset,
    rewards: np.ndarray,
    settings: LearningSection,
    make: Callable[[Dataset, np.ndarray], Chooser],
) -> tuple[np.ndarray, np.ndarray]:
    """([n], [n]) mean rewards over the loads, of choosers that had not seen the prompt and of the
    arm that is best in hindsight. rewards: [L, N, A]; make: rows and their rewards to a chooser.
    """
    number = fold_numbers(data.groups, settings.seed)
    earned, single = [], []
    best = np.nanmean(rewards, axis=1).argmax(axis=1)  # [L]
    for i in range(num_folds(len(data))):
        own = number == i
        chooser = make(data.rows(~own), rewards[:, ~own])
        earned.append(earned_by(chooser, data.rows(own), rewards[:, own], settings))
        single.append(
            rewards[np.arange(len(best))[:, None], own.nonzero()[0], best[:, None]].mean(axis=0)
        )
    return np.concatenate(earned), np.concatenate(single)


def earned_by(
    chooser: Chooser, data: Dataset, rewards: np.ndarray, settings: LearningSection
) -> np.ndarray:
    """[N] mean rewards over the loads of what a chooser takes. rewards: [L, N, A]."""
    if isinstance(chooser, PortableChooser) and chooser.pricer is None:
        chooser.pricer = data.pricer()
    loads = settings.loads if len(rewards) == len(settings.loads) else (1,)
    distributions = (
        chooser.distribution(chooser.preferences(data.features, data.situation(rows)))
        for rows in loads
    )
    # an arm that is not taken counts for nothing, also where its reward is not known
    earned = [
        np.where(distribution > 0, distribution * own, 0.0).sum(axis=1)
        for distribution, own in zip(distributions, rewards, strict=True)
    ]
    return np.asarray(np.mean(earned, axis=0))


def outcomes_of(data: Dataset) -> np.ndarray:
    """[N, 3 A + 1] what portable choosers predict: rates of rounds, of drafted tokens and of rounds
    that draft nothing, and the logarithm of the tokens after the first.
    """
    tokens = np.log(np.maximum(data.num_tokens - 1, 1))[:, None]
    rates = (data.rounds_per_token, data.drafted_per_token, data.empty_per_token)
    return np.hstack([*rates, tokens])


def outcome_weights(data: Dataset) -> np.ndarray:
    """[N, 3 A + 1], of mean 1: a prompt's rates weigh as many as its tokens, which is how prompts add up
    to the seconds of all; its length weighs as any other's.
    """
    tokens = np.maximum(data.num_tokens - 1, 1).astype(np.float64)
    weights = np.repeat((tokens / tokens.mean())[:, None], 3 * len(data.arms) + 1, axis=1)
    weights[:, -1] = 1.0
    return weights
