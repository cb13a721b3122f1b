"""k nearest neighbours: predicts for a prompt what arms did on the prompts most like it.

Cross-validation finds k; nothing else is trained. Where the gain is no more than its standard error,
every prompt gets the average prediction. Symbols: N prompts, A arms.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.learning.learners.base import (
    Curve,
    Fitted,
    Learner,
    LearnerSettings,
    Summary,
    block_weights,
    cross_validate,
    earned_unselected,
    judged_groups,
    outcome_weights,
    outcomes_of,
    reduce,
    rewards_by_load,
)
from paceline.selection.choosers import NeighboursChooser

if TYPE_CHECKING:
    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset

_COMPONENTS: Final = 32
_WIDE: Final = 10.0  # hidden states tell tasks apart; distances in the statistics only blur them
_MOST_POINTS: Final = 4096  # searching more would take too long for a decision
_COUNTS: Final = (3, 5, 10, 20, 40)


class NeighboursLearner(Learner[LearnerSettings]):
    """Picks the number of neighbours by cross-validation."""

    name = "knn"
    Settings = LearnerSettings
    chooser = NeighboursChooser
    predicts_work = True

    def fit(self, data: Dataset, settings: LearnerSettings, on_progress: Progress) -> Fitted:
        rewards = rewards_by_load(data, settings)
        counts = [count for count in _COUNTS if count <= max(len(data) // 4, _COUNTS[0])]
        judged = {}
        for done, count in enumerate(counts):
            judged[count] = cross_validate(
                data, rewards, settings, partial(_chooser, settings, count)
            )
            on_progress("cross-validation", done + 1, len(counts))
        best = max(counts, key=lambda count: judged[count][0].mean())
        all_earned = np.stack([judged[count][0] for count in counts])  # [counts, n]
        earned = earned_unselected(all_earned, all_earned, judged_groups(data, settings.seed))
        single = judged[best][1]
        summary = Summary.judged(len(data), earned, single, {"num_neighbours": best})
        points = tuple((float(count), float(judged[count][0].mean())) for count in counts)
        chooser = _chooser(settings, best, data, rewards)
        if summary.constant:
            chooser = _average(data, chooser)
        return Fitted(chooser, summary, Curve("neighbours", points))


def _chooser(
    settings: LearnerSettings, count: int, data: Dataset, rewards: np.ndarray
) -> NeighboursChooser:
    weights = block_weights(data.spans, data.features.shape[1], _WIDE)
    reduction = reduce(data.features, weights, _COMPONENTS)
    order = np.random.default_rng(settings.seed).permutation(len(data))[:_MOST_POINTS]
    places = np.sort(order)
    return NeighboursChooser(
        data.arms,
        reduction,
        reduction(data.features[places]),
        outcomes_of(data)[places].astype(np.float32),
        min(count, len(places)),
        np.array(data.composed, dtype=np.int64),
    )


def _average(data: Dataset, chooser: NeighboursChooser) -> NeighboursChooser:
    """Return a chooser of one point, which predicts the mean outcomes for every prompt."""
    outcomes = (outcome_weights(data) * outcomes_of(data)).mean(axis=0)
    point = np.zeros((1, chooser.reduction.num_components), dtype=np.float32)
    outcomes = outcomes[None].astype(np.float32)
    return NeighboursChooser(data.arms, chooser.reduction, point, outcomes, 1, chooser.composed)
