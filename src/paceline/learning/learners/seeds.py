"""One learner under several seeds: how much its score depends on chance, and which result is kept.

Choosers of a kind that can be averaged are averaged: the average varies less than any of them, and no
seed is picked for a lucky score. Otherwise the seed with the best score on prompts not learned from is
kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.learning.learners.base import Fitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners.base import Learner, LearnerSettings


@dataclass(frozen=True, slots=True)
class Seeds:
    """Scores of the seeds, in their order, and the result kept: their `average` or the `best`."""

    scores: tuple[float, ...]
    kept: str

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; 0 for one seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else 0.0


def fit_seeds(
    learner: Learner[Any], data: Dataset, settings: LearnerSettings, on_progress: Progress
) -> tuple[Fitted, Seeds]:
    """Fit under `settings.seeds` seeds from `settings.seed` on."""
    fits = []
    for i in range(settings.seeds):
        own = settings.model_copy(update={"seed": settings.seed + i})
        fits.append(learner.fit(data, own, _named(on_progress, settings, own.seed)))
    scores = tuple(fit.summary.score for fit in fits)
    average = _average(fits) if len(fits) > 1 else None
    if average is None:
        return fits[int(np.argmax(scores))], Seeds(scores, "best")
    return average, Seeds(scores, "average")


def _named(on_progress: Progress, settings: LearnerSettings, seed: int) -> Progress:
    """Return the callback that names the seed, where there are several."""
    if settings.seeds == 1:
        return on_progress
    return lambda stage, done, total: on_progress(f"{stage}, seed {seed}", done, total)


def _average(fits: Sequence[Fitted]) -> Fitted | None:
    """Return the average of the seeds that agree with the majority on whether there is a gain.

    Summary and curve are those of the best of these seeds. None: the choosers have no average.
    """
    constant = sum(fit.summary.constant for fit in fits) > len(fits) / 2
    agreeing = [fit for fit in fits if fit.summary.constant == constant]
    best = max(agreeing, key=lambda fit: fit.summary.score)
    if constant:
        return best
    choosers = [fit.chooser for fit in agreeing]
    merged = type(choosers[0]).merged(choosers)
    return None if merged is None else Fitted(merged, best.summary, best.curve)
