"""One learner under several seeds: how much its score hangs on chance, and what is kept of them.

Where the kind of chooser can be averaged the average of all seeds is kept: it scatters less than
any one of them, and no seed is picked for a score that chance gave it. Where it cannot, the one
with the best score on prompts not learned from is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.learning.learners.base import Fitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import LearningSection
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners.base import Learner, Progress


@dataclass(frozen=True, slots=True)
class Seeds:
    """Scores of the seeds, in their order, and what was kept: `average`, or `best` of them."""

    scores: tuple[float, ...]
    kept: str

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; 0 of a single one."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else 0.0


def fit_seeds(
    learner: Learner, data: Dataset, settings: LearningSection, on_progress: Progress
) -> tuple[Fitted, Seeds]:
    """Fit under `settings.seeds` seeds from `settings.seed` on."""
    fits = []
    for i in range(settings.seeds):
        own = settings.model_copy(update={"seed": settings.seed + i})

        fits.append(learner.fit(data, own, _named(on_progress, settings, own.seed)))
    scores = tuple(fit.summary.score for fit in fits)
    best = fits[int(np.argmax(scores))]
    if len(fits) == 1:
        return best, Seeds(scores, "best")
    average = _average(fits)
    if average is None:
        return best, Seeds(scores, "best")
    return average, Seeds(scores, "average")


def _named(on_progress: Progress, settings: LearningSection, seed: int) -> Progress:
    """Progress of one seed among several."""
    if settings.seeds == 1:
        return on_progress
    return lambda stage, done, total: on_progress(f"{stage}, seed {seed}", done, total)


def _average(fits: Sequence[Fitted]) -> Fitted | None:
    """The seeds' average, of those that agree with most of them on whether there was anything to
    learn; the summary and curve of the best of these go with it.
    """
    constant = sum(fit.summary.constant for fit in fits) > len(fits) / 2
    agreeing = [fit for fit in fits if fit.summary.constant == constant]
    best = max(agreeing, key=lambda fit: fit.summary.score)
    if constant:
        return best
    choosers = [fit.chooser for fit in agreeing]
    merged = type(choosers[0]).merged(choosers)
    return None if merged is None else Fitted(merged, best.summary, best.curve)
