"""A collection as arrays: what a policy sees of each prompt and what every arm would have earned.

Knows rewards and prices, no model and no file. The domain goes along for tables; it is not among
the features. Symbols: N prompts, F features, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE, split_arm
from paceline.errors import ConfigError, StoreError
from paceline.replay import rounds_of
from paceline.rewards import alignments, request_seconds
from paceline.store import is_validation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import LearningSection
    from paceline.contracts import CollectedPrompt
    from paceline.replay import rounds_of
from paceline.rewards import SecondsFn

MIN_PROMPTS: Final = 8
_MIN_HELD_OUT: Final = 2


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompts as rows, arms as columns."""

    arms: tuple[str, ...]  # A
    ids: tuple[str, ...]  # N
    domains: tuple[str, ...]  # N
    features: np.ndarray  # [N, F] float32
    rewards: np.ndarray  # [N, A] float64
    seconds: np.ndarray  # [N, A] float64, predicted for the whole request
    num_tokens: np.ndarray  # [N] int64, emitted

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, mask: np.ndarray) -> Dataset:
        """The prompts where a mask [N] is true."""
        places = np.flatnonzero(mask)
        return Dataset(
            arms=self.arms,
            ids=tuple(self.ids[i] for i in places),
            domains=tuple(self.domains[i] for i in places),
            features=self.features[places],
            rewards=self.rewards[places],
            seconds=self.seconds[places],
            num_tokens=self.num_tokens[places],
        )


def build_dataset(
    prompts: Sequence[CollectedPrompt],
    arms: Sequence[str],
    seconds: SecondsFn,
    settings: LearningSection,
) -> tuple[Dataset, list[str]]:
    """(dataset, notes for the reader). `arms` must hold `none` and at least one drafter.

    Raises ConfigError or StoreError if nothing can be learned from it.
    """
    arms = tuple(arms)
    _check_arms(arms, prompts)
    predicted = np.array(
        [
            [
                request_seconds(seconds, split_arm(arm)[0], len(p.prompt_tokens), rounds_of(p, arm))
                for arm in arms
            ]
            for p in prompts
        ]
    )  # [N, A]
    notes: list[str] = []
    if settings.reward == "speed":
        # rewards.speeds, without pricing everything again
        rewards = predicted[:, [arms.index(NONE)]] / predicted
    else:
        rewards, notes = _alignment_rewards(prompts, arms, seconds, settings.alpha)
    dataset = Dataset(
        arms=arms,
        ids=tuple(p.id for p in prompts),
        domains=tuple(p.domain for p in prompts),
        features=_stack_features(prompts),
        rewards=rewards,
        seconds=predicted,
        num_tokens=np.array([len(p.output_tokens) for p in prompts]),
    )
    return dataset, notes + check_learnable(dataset)


def _check_arms(arms: tuple[str, ...], prompts: Sequence[CollectedPrompt]) -> None:
    if NONE not in arms or len(arms) < 2:
        raise ConfigError(
            f"a policy chooses between '{NONE}' and at least one drafter, there is only "
            f"{', '.join(arms) or 'nothing'}; add a drafter to the configuration"
        )
    if len(prompts) < MIN_PROMPTS:
        raise StoreError(
            f"{len(prompts)} prompts are too few to learn from, at least {MIN_PROMPTS} are needed "
            "(some hundred is better); run `paceline collect` with more prompts"
        )


def _stack_features(prompts: Sequence[CollectedPrompt]) -> np.ndarray:
    """[N, F] float32."""
    width = prompts[0].features.shape
    for prompt in prompts:
        if prompt.features.shape != width or len(width) != 1:
            raise StoreError(
                f"prompt '{prompt.id}' has features of shape {prompt.features.shape}, "
                f"'{prompts[0].id}' of {width}; collect into a new folder"
            )
        if not np.isfinite(prompt.features).all():
            raise StoreError(
                f"a feature of prompt '{prompt.id}' is not a finite number: the target overflowed; "
                "try another dtype for it and collect into a new folder"
            )
    return np.stack([p.features for p in prompts]).astype(np.float32)


def _alignment_rewards(
    prompts: Sequence[CollectedPrompt], arms: tuple[str, ...], seconds: SecondsFn, alpha: float
) -> tuple[np.ndarray, list[str]]:
    """([N, A], notes). An arm that never writes a text of its own has an empty one."""
    writing = {arm for prompt in prompts for arm in prompt.draft_outputs if arm in arms}
    silent = [arm for arm in arms if arm != NONE and arm not in writing]
    if not writing:
        raise StoreError(
            "the reward 'alignment' compares texts the drafters wrote on their own, and the "
            "collection has none; run `paceline collect --alignment`, or use the reward 'speed'"
        )
    rewards = np.empty((len(prompts), len(arms)))
    for row, prompt in zip(rewards, prompts, strict=True):
        missing = sorted(writing - prompt.draft_outputs.keys())
        if missing:
            raise StoreError(
                f"prompt '{prompt.id}' has no text of '{missing[0]}' on its own; run `paceline "
                "collect --alignment` again to finish it"
            )
        outputs = {arm: prompt.draft_outputs.get(arm, ()) for arm in arms if arm != NONE}
        num_prompt = len(prompt.prompt_tokens)
        found = alignments(seconds, alpha, num_prompt, prompt.output_tokens, outputs)
        row[:] = [found[arm] for arm in arms]
    notes = [
        f"'{arm}' writes no text of its own in this collection: its similarity counts as 0"
        for arm in silent
    ]
    return rewards, notes


def check_learnable(dataset: Dataset) -> list[str]:
    """Notes on rewards; raises StoreError where there is no choice to learn."""
    rewards = dataset.rewards
    if not np.isfinite(rewards).all() or not np.isfinite(dataset.seconds).all():
        raise StoreError("a predicted time is not a finite number; run `paceline profile` again")
    if np.ptp(rewards, axis=1).max() <= 1e-9 * np.abs(rewards).max():
        raise StoreError(
            "every arm has the same reward on every prompt, so there is nothing to choose; add "
            "drafters that differ, or collect longer outputs"
        )
    winners = rewards.argmax(axis=1)
    if (rewards >= rewards.max(axis=1, keepdims=True))[:, winners[0]].all():
        return [f"'{dataset.arms[winners[0]]}' is best on every prompt: one arm would do"]
    return []


def split(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """(training part, held-out part), by hash of id, so that no order of prompts matters."""
    held_out = np.array([is_validation(id, share) for id in dataset.ids])
    num_held_out = int(held_out.sum())
    if num_held_out < _MIN_HELD_OUT or len(dataset) - num_held_out < MIN_PROMPTS - _MIN_HELD_OUT:
        raise StoreError(
            f"of {len(dataset)} prompts {num_held_out} would be held out: too few are left to "
            "learn or to test on; collect more prompts or change learning.held_out"
        )
    return dataset.rows(~held_out), dataset.rows(held_out)
