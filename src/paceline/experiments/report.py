"""Findings as markdown, as JSON and as a figure, with the circumstances of the run."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.bench.circumstances import headline
from paceline.files import write_atomically
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.experiments.findings import Experiment, Findings, Panel, Table

_COLOURS: Final = (
    "#3b6ea5", "#c44e52", "#1a7f37", "#d9b44a", "#7a5ba6", "#8c6d46", "#5f9ea0", "#888888",
    "#f28e2b", "#e377a2", "#2f2f2f", "#a6c36f",
)  # fmt: skip
_BARS_OF_ALL: Final = 0.82  # share of a tick's width that its bars fill
_LEGEND_ENTRY: Final = 2.2  # inches
_CHARACTERS_PER_INCH: Final = 15  # names with more characters in all are turned
_LONG_NAME: Final = 20  # characters; longer ones below an axis are turned


def write_report(
    experiment: Experiment,
    findings: Findings,
    facts: Mapping[str, str | int],
    folder: Path,
) -> list[Path]:
    """Write NAME.md, NAME.json and NAME.png to a folder and return their paths. facts: circumstances."""
    paths = [folder / f"{experiment.name}.{suffix}" for suffix in ("md", "json", "png")]
    text = markdown(experiment, findings, facts)
    everything = {
        "experiment": experiment.name,
        "title": experiment.title,
        "circumstances": dict(facts),
        **asdict(findings),
    }
    write_figure(findings.panels, experiment.title, paths[2])
    data = json.dumps(everything, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(paths[1], data.encode() + b"\n")
    write_atomically(paths[0], text.encode())
    return paths


def markdown(experiment: Experiment, findings: Findings, facts: Mapping[str, str | int]) -> str:
    """Return the report of an experiment."""
    shown = ", ".join(f"{name}: {value}" for name, value in findings.settings.items())
    lines = [f"# {experiment.title}", ""]
    if experiment.claim is not None:
        lines += [f"The paper: {experiment.claim}.", ""]
    lines += [f"{headline(facts)} {shown[:1].upper()}{shown[1:]}. `{facts['command']}`", ""]
    lines += [line for found in findings.tables for line in table_lines(found)]
    lines += [*(f"- {remark}" for remark in findings.remarks), ""]
    lines += [f"![{experiment.title}]({experiment.name}.png)"]
    return "\n".join(lines) + "\n"


def table_lines(table: Table) -> list[str]:
    """Return the lines of a section with a table."""
    lines = [f"## {table.title}", "", table.explanation, ""]
    lines += ["| " + " | ".join(column.name for column in table.columns) + " |"]
    lines += ["|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in table.texts()]
    return [*lines, ""]


def write_figure(
    panels: Sequence[Panel],
    title: str,
    path: Path,
    colours: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a PNG with the panels side by side. colours: by label of a series.

    Raises ConfigError with the command that installs matplotlib if it is missing.
    """
    widths = [_width(panel) for panel in panels]
    figure = import_figure()(figsize=(sum(widths), 5.0), layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, panel, width in zip(places, panels, widths, strict=True):
        colour_of = {s.label: _COLOURS[i % len(_COLOURS)] for i, s in enumerate(panel.series)}
        draw = _draw_bars if panel.kind == "bars" else _draw_lines
        draw(axes, panel, {**colour_of, **colours})
        if panel.baseline is not None:
            axes.axhline(panel.baseline, color="black", linewidth=1, linestyle="--")
        axes.set_title(panel.title, fontsize=10)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            fontsize=8,
            frameon=False,
            ncols=max(1, int(width / _LEGEND_ENTRY)),
            loc="lower center",
            bbox_to_anchor=(0.5, 1.06),
        )
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _width(panel: Panel) -> float:
    """Return inches: as many as a panel's bars need, or those of a line plot."""
    if panel.kind == "lines":
        return 5.5
    return max(4.5, 0.15 * sum(len(series.x) for series in panel.series) + 1.0)


def _draw_lines(axes: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    for series in panel.series:
        colour = colours[series.label]
        axes.plot(series.x, series.y, marker="o", markersize=4, label=series.label, color=colour)
        if series.low is not None and series.high is not None:
            axes.fill_between(series.x, series.low, series.high, alpha=0.2, color=colour)
    if panel.log_x:
        axes.set_xscale("log")
        points = sorted({float(x) for series in panel.series for x in series.x})
        axes.set_xticks(points, [f"{x:,g}" for x in points], fontsize=8)
        axes.minorticks_off()


def _draw_bars(axes: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    names = list(dict.fromkeys(str(x) for series in panel.series for x in series.x))
    width = _BARS_OF_ALL / len(panel.series)
    for i, series in enumerate(panel.series):
        shift = (i - (len(panel.series) - 1) / 2) * width
        error = None
        if series.low is not None and series.high is not None:
            error = np.abs(np.subtract([series.low, series.high], series.y))
        axes.bar(
            [names.index(str(x)) + shift for x in series.x],
            series.y,
            width,
            label=series.label,
            color=colours[series.label],
            yerr=error,
            error_kw={"linewidth": 0.8},
        )
    lengths = [max(map(len, name.split("\n"))) for name in names]
    crowded = sum(lengths) > _CHARACTERS_PER_INCH * _width(panel)
    is_turned = crowded or max(lengths, default=0) > _LONG_NAME
    turned = {"rotation": 30, "ha": "right"} if is_turned else {}
    axes.set_xticks(range(len(names)), names, fontsize=8, **turned)
