"""Learning curves: the score as training goes on, and the speed-up by the number of prompts.

The first is cross-validated, the second is of the held-out part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE, no_progress
from paceline.learning.evaluation.contenders import Contender
from paceline.learning.learners import find_learner
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners import Curve, LearnerSettings

_FEWEST: Final = 30  # prompts at which the curve by number of prompts begins


def speed_by_prompts(
    train: Dataset, held_out: Dataset, settings: LearnerSettings, on_progress: Progress
) -> list[tuple[int, float]]:
    """Return (prompts learned from, speed-up over `none` on the held-out part), the number doubling."""
    order = np.random.default_rng(settings.seed).permutation(len(train))
    counts = [_FEWEST * 2**i for i in range(32) if _FEWEST * 2**i < len(train)] + [len(train)]
    learner = find_learner(settings.learner)
    points = []
    for done, count in enumerate(counts):
        part = train.rows(np.sort(order[:count]))
        chooser = learner.fit(part, settings, no_progress).chooser
        (distribution,) = Contender(learner.name, (chooser,)).distributions(held_out)
        points.append((count, held_out.speedup(distribution)))
        on_progress("by number of prompts", done + 1, len(counts))
    return points


def plot(
    curve: Curve,
    points: list[tuple[int, float]],
    train: Dataset,
    held_out: Dataset,
    title: str,
    path: Path,
) -> None:
    """Write the curves as a PNG. Raises ConfigError without matplotlib.

    train: the part that chooses the best single arm.
    """
    figure = import_figure()(figsize=(9, 3.6), layout="constrained")
    training, examples = figure.subplots(1, 2)
    if curve.points:
        training.plot(*zip(*curve.points, strict=True))
    training.set(xlabel=curve.label, ylabel="mean reward, not learned from", title=title)
    counts, speedups = zip(*points, strict=True)
    examples.semilogx(counts, speedups, "o-", label="policy")
    examples.set_xticks(counts, [str(count) for count in counts])
    examples.minorticks_off()
    arms = np.eye(len(held_out.arms))
    oracle = held_out.speedup(arms[held_out.seconds.argmin(axis=1)])
    single = held_out.speedup(arms[train.seconds.sum(axis=0).argmin()])
    examples.axhline(oracle, color="0.3", linestyle=":", label="oracle")
    examples.axhline(single, color="0.6", linestyle="--", label="best single arm")
    examples.set(xlabel="prompts learned from", ylabel=f"predicted speed-up over {NONE}, held out")
    examples.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
