"""A picture of a search: speed-up by trial, and the sub-layers that the best subset leaves out."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from paceline.plotting import import_figure

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.layer_search.search import SearchReport


def plot(report: SearchReport, path: Path) -> None:
    """Write a PNG."""
    figure = import_figure()(figsize=(8, 5), layout="constrained")
    course, layers = figure.subplots(2, 1, height_ratios=[3, 1])
    speeds = [report.speedup(trial) for trial in report.trials]
    numbers = range(1, len(speeds) + 1)
    course.plot(numbers, speeds, ".", color="0.6", label="a trial")
    course.step(numbers, list(accumulate(speeds, max)), where="post", label="best so far")
    course.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":", label="target alone")
    course.set(xlabel="trial", ylabel="speed over plain decoding")
    course.legend()
    _draw_layers(layers, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_layers(axes: Any, report: SearchReport) -> None:
    best = report.best
    skipped = [best.skip_attention, best.skip_mlp]
    kept = [[i not in row for i in range(report.num_layers)] for row in skipped]
    axes.imshow(kept, cmap="Greens", vmin=-0.3, vmax=1.6, aspect="auto")
    axes.set_yticks([0, 1], ["attention", "MLP"])
    axes.set_xticks(range(report.num_layers), minor=True)
    axes.set(xlabel="layer", title=f"kept (dark): {report.speedup(best):.2f}x")
