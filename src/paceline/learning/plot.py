"""Learning curves: the score as training goes on, and the speed by the number of prompts.

Both on prompts not learned from: the first by cross-validation, the second on the held-out part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.errors import ConfigError
from paceline.learning.learners import LEARNERS, oracle
from paceline.selection.choosers import PortableChooser

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.config import LearningSection
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners import Curve, Progress
    from paceline.selection.choosers import Chooser

_FEWEST: Final = 30  # prompts that the curve by number of prompts begins at


def speed_by_prompts(
    train: Dataset, held_out: Dataset, settings: LearningSection, on_progress: Progress
) -> list[tuple[int, float]]:
    """(prompts learned from, speed over `none` on the held-out part), the number doubling."""
    order = np.random.default_rng(settings.seed).permutation(len(train))
    counts = [_FEWEST * 2**i for i in range(32) if _FEWEST * 2**i < len(train)] + [len(train)]
    points = []
    for done, count in enumerate(counts):
        part = train.rows(np.sort(order[:count]))
        fitted = LEARNERS[settings.learner].fit(part, settings, lambda stage, done, total: None)
        points.append((count, speed_of(fitted.chooser, held_out)))
        on_progress("by number of prompts", done + 1, len(counts))
    return points


def speed_of(chooser: Chooser, data: Dataset) -> float:
    """Seconds of `none` on all prompts over those of a chooser's arms."""
    if isinstance(chooser, PortableChooser) and chooser.pricer is None:
        chooser.pricer = data.pricer()
    distribution = chooser.distribution(chooser.preferences(data.features, data.situation()))
    none = data.seconds[:, data.arms.index("none")]
    return float(none.sum() / (distribution * data.seconds).sum())


def plot(
    curve: Curve, points: list[tuple[int, float]], held_out: Dataset, title: str, path: Path
) -> None:
    """Write a PNG."""
    figure = import_figure()(figsize=(9, 3.6), layout="constrained")
    course, examples = figure.subplots(1, 2)
    if curve.points:
        course.plot(*zip(*curve.points, strict=True))
    course.set(xlabel=curve.label, ylabel="mean reward, not learned from", title=title)
    counts, speeds = zip(*points, strict=True)
    examples.semilogx(counts, speeds, "o-", label="policy")
    examples.set_xticks(counts, [str(count) for count in counts])
    examples.minorticks_off()
    none = held_out.seconds[:, held_out.arms.index("none")].sum()
    best = none / held_out.seconds[np.arange(len(held_out)), oracle(held_out)].sum()
    single = none / held_out.seconds.sum(axis=0).min()
    examples.axhline(best, color="0.3", linestyle=":", label="oracle")
    examples.axhline(single, color="0.6", linestyle="--", label="best single arm")
    examples.set(xlabel="prompts learned from", ylabel="predicted speed over none, held out")
    examples.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def import_figure() -> Any:
    """matplotlib's figure. Raises ConfigError with what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "the plot needs matplotlib; install it with: pip install 'paceline[bench]'"
        ) from error
    return Figure
