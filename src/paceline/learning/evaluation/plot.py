"""An evaluation as a picture: the speed-up of every strategy over `none`, with its interval."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

from paceline.contracts import NONE
from paceline.learning.evaluation.ceilings import CEILINGS
from paceline.learning.evaluation.strategies import ORACLE
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from paceline.learning.evaluation.figures import Figures
    from paceline.learning.evaluation.report import EvaluationReport
    from paceline.learning.evaluation.sections import Evaluation, Section

_POLICY: Final = "#1a7f37"
_OTHER: Final = "#3b6ea5"
_ARM: Final = "0.55"
_COLUMNS: Final = 3  # of sections
_LINE: Final = 85  # characters above a column


def plot(evaluation: Evaluation, path: Path) -> None:
    """Write a PNG with one panel per section. Raises ConfigError without matplotlib."""
    make_figure = import_figure()
    sections = evaluation.sections
    columns = min(_COLUMNS, len(sections))
    rows = -(-len(sections) // columns)
    most = max(len(_strategies(section.report)) for section in sections)
    figure = make_figure(
        figsize=(2.2 + 4.0 * columns, (1.1 + 0.24 * most) * rows + 0.5), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, section in zip(panels, sections, strict=False):
        _draw(axes, section)
    for axes in panels[len(sections) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(sections) - columns) : len(sections)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(f"predicted speed-up over {NONE}, 95% interval")
    facts = evaluation.circumstances.items()
    shown = ", ".join(f"{name} {value}" for name, value in facts if name != "command")
    figure.suptitle(fill(shown, _LINE * columns), fontsize=7, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _strategies(report: EvaluationReport) -> list[tuple[str, Figures, str]]:
    """Return (name, figures, colour) from top to bottom, without `none`, which is the line at 1."""
    arms: Mapping[str, Figures] = report.overall.arms
    shown = [(name, figures, _ARM) for name, figures in arms.items() if name != NONE]
    for name, figures in report.overall.strategies.items():
        shown.append((name, figures, _POLICY if name in report.policies else _OTHER))
    return shown


def _draw(axes: Any, section: Section) -> None:
    report = section.report
    strategies = _strategies(report)
    for place, (name, figures, colour) in enumerate(strategies):
        speed = figures.speedup
        axes.plot([speed.low, speed.high], [place, place], color=colour, linewidth=2)
        axes.plot(speed.value, place, "o", color=colour, markersize=5)
        if name in report.slowest and name not in (ORACLE, *CEILINGS) and len(report.by_domain) > 1:
            slowest = report.slowest[name]
            axes.plot(slowest.speedup.value, place, "|", color=colour, markersize=11)
    oracle = report.overall.strategies[ORACLE].speedup.value
    axes.axvline(oracle, color="0.7", linewidth=0.8, linestyle=":")
    axes.axvline(1.0, color="black", linewidth=0.9, linestyle="--")
    axes.set_yticks(range(len(strategies)), [name for name, _, _ in strategies], fontsize=8)
    axes.set_ylim(len(strategies) - 0.4, -0.6)
    bar = ", bar: slowest task" if len(report.by_domain) > 1 else ""
    axes.set_title(f"{section.title}: {report.overall.num_prompts} prompts{bar}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
