"""Baselines that a learned chooser must beat: one arm, any arm, and a table of first tokens.

Symbols: N prompts, A arms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.learning.learners.base import (
    Curve,
    Fitted,
    Learner,
    LearnerSettings,
    Summary,
    best_single,
    earned_unselected,
    gain_over_single,
    make_folds,
    rewards_by_load,
)
from paceline.selection.choosers import FirstLineChooser, FixedChooser, RandomChooser

if TYPE_CHECKING:
    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset

_LENGTHS: Final = (4, 8, 12, 16, 24)  # first tokens of a prompt that may tell prompts apart


class FixedLearner(Learner[LearnerSettings]):
    """Picks the best single arm, by load."""

    name = "fixed"
    Settings = LearnerSettings
    chooser = FixedChooser

    def fit(self, data: Dataset, settings: LearnerSettings, on_progress: Progress) -> Fitted:
        rewards = rewards_by_load(data, settings)
        score = float(rewards.mean(axis=1).max(axis=1).mean())
        summary = Summary(len(data), 0, score, 0.0, 0.0, constant=True)
        return Fitted(best_single(data, rewards, settings), summary, Curve("prompts"))


class RandomLearner(Learner[LearnerSettings]):
    """Takes every arm equally often."""

    name = "random"
    Settings = LearnerSettings
    chooser = RandomChooser

    def fit(self, data: Dataset, settings: LearnerSettings, on_progress: Progress) -> Fitted:
        score = float(data.rewards.mean())
        summary = Summary(len(data), 0, score, 0.0, 0.0, constant=False)
        return Fitted(RandomChooser(data.arms), summary, Curve("prompts"))


class FirstLineLearner(Learner[LearnerSettings]):
    """Picks the best arm of the prompts with the same first tokens.

    Cross-validation finds the number of these tokens.
    """

    name = "first_line_lookup"
    Settings = LearnerSettings
    chooser = FirstLineChooser

    def fit(self, data: Dataset, settings: LearnerSettings, on_progress: Progress) -> Fitted:
        earned = {length: _cross_validate(data, settings.seed, length) for length in _LENGTHS}
        length = max(_LENGTHS, key=lambda candidate: earned[candidate].mean())
        single = data.rewards[:, data.rewards.mean(axis=0).argmax()]
        all_earned = np.stack(list(earned.values()))  # [lengths, N]
        judged = earned_unselected(all_earned, all_earned, data.groups)
        gain, error = gain_over_single(judged, single)
        score = float(judged.mean())
        summary = Summary(len(data), len(data), score, gain, error, False, {"length": length})
        return Fitted(_table(data, length), summary, Curve("prompts"))


def _cross_validate(data: Dataset, seed: int, length: int) -> np.ndarray:
    """Return the rewards [N] of tables of the first `length` tokens of other folds' prompts."""
    earned = np.empty(len(data))
    for rest, own in make_folds(data.groups, seed):
        part = data.rows(own)
        distribution = _table(data.rows(rest), length).preferences(part.features, part.situation())
        earned[own] = (distribution * part.rewards).sum(axis=1)
    return earned


def _table(data: Dataset, length: int) -> FirstLineChooser:
    """Return, by the first `length` tokens, the arm with the largest mean reward."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(data.prompts):
        rows.setdefault(tuple(prompt[:length]), []).append(i)
    table = {
        # a single prompt tells nothing about others with the same first tokens
        beginning: int(data.rewards[places].mean(axis=0).argmax())
        for beginning, places in rows.items()
        if len(places) > 1
    }
    return FirstLineChooser(data.arms, table, int(data.rewards.mean(axis=0).argmax()), length)
