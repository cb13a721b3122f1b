"""What a learned chooser must beat: one arm, any arm, and what the first tokens of a prompt say.

`per_task` and `oracle` know what no request tells, so they are choices on a dataset and no
learners: they are for evaluation. Symbols: N prompts, A arms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.learning.learners.base import (
    NUM_FOLDS,
    Curve,
    Fitted,
    Learner,
    Summary,
    fold_numbers,
    gain_over_single,
    rewards_by_load,
)
from paceline.learning.learners.networks import best_single
from paceline.selection.choosers import FirstLineChooser, RandomChooser

if TYPE_CHECKING:
    from paceline.config import LearningSection
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners.base import Progress

_LENGTHS: Final = (4, 8, 12, 16, 24)  # tokens of a prompt's beginning to tell prompts apart by


class FixedLearner(Learner):
    """The best single arm, by load."""

    name = "fixed"

    def fit(self, data: Dataset, settings: LearningSection, on_progress: Progress) -> Fitted:
        rewards = rewards_by_load(data, settings)
        score = float(rewards.mean(axis=1).max(axis=1).mean())
        summary = Summary(len(data), 0, score, 0.0, 0.0, constant=True)
        return Fitted(best_single(data, rewards, settings), summary, Curve("prompts"))


class RandomLearner(Learner):
    """Every arm equally often."""

    name = "random"

    def fit(self, data: Dataset, settings: LearningSection, on_progress: Progress) -> Fitted:
        score = float(data.rewards.mean())
        summary = Summary(len(data), 0, score, 0.0, 0.0, constant=False)
        return Fitted(RandomChooser(data.arms), summary, Curve("prompts"))


class FirstLineLearner(Learner):
    """The best arm of the prompts that begin alike; cross-validation finds what counts as alike."""

    name = "first_line_lookup"

    def fit(self, data: Dataset, settings: LearningSection, on_progress: Progress) -> Fitted:
        number = fold_numbers(data.groups, settings.seed)
        earned = {length: self._cross_validate(data, number, length) for length in _LENGTHS}
        length = max(_LENGTHS, key=lambda candidate: earned[candidate].mean())
        single = data.rewards[:, data.rewards.mean(axis=0).argmax()]
        gain, error = gain_over_single(earned[length], single)
        summary = Summary(
            len(data),
            len(data),
            float(earned[length].mean()),
            gain,
            error,
            False,
            {"length": length},
        )
        return Fitted(_table(data, length), summary, Curve("prompts"))

    def _cross_validate(self, data: Dataset, number: np.ndarray, length: int) -> np.ndarray:
        earned = np.empty(len(data))
        for i in range(NUM_FOLDS):
            own = number == i
            if own.any() and not own.all():
                part = data.rows(own)
                chooser = _table(data.rows(~own), length)
                distribution = chooser.preferences(part.features, part.situation())
                earned[own] = (distribution * part.rewards).sum(axis=1)
        return earned


def _table(data: Dataset, length: int) -> FirstLineChooser:
    """By the first `length` tokens, the arm with the largest mean reward."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(data.prompts):
        rows.setdefault(tuple(prompt[:length]), []).append(i)
    table = {
        # one prompt says nothing of others that begin alike
        beginning: int(data.rewards[places].mean(axis=0).argmax())
        for beginning, places in rows.items()
        if len(places) > 1
    }
    return FirstLineChooser(data.arms, table, int(data.rewards.mean(axis=0).argmax()), length)


def oracle(data: Dataset) -> np.ndarray:
    """[N] places of arms: the fastest of each request, known afterwards."""
    return np.asarray(data.seconds.argmin(axis=1))
