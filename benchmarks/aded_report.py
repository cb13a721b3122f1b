"""The result of the tri-gram experiment as JSON, as markdown and as a figure."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from aded_experiment import ALL_TASKS, BUDGETS, LOOKUP, SEARCHES

from paceline.contracts import NONE
from paceline.experiments.findings import Panel, Series
from paceline.experiments.report import write_figure as write_figure_of
from paceline.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from aded_experiment import AdedResult, ArmFigures


def write_report(result: AdedResult, folder: Path) -> str:
    """Write aded.json, aded.md and aded.png to a folder and return the markdown."""
    text = markdown(result)
    data = json.dumps(asdict(result), indent=1).encode() + b"\n"
    write_atomically(folder / "aded.json", data)
    write_atomically(folder / "aded.md", text.encode())
    write_figure(result, folder / "aded.png")
    return text


def markdown(result: AdedResult) -> str:
    """Return the report with all tables."""
    facts, settings = result.circumstances, result.settings
    lines = [
        f"{facts['cpu']} ({facts['cpu_capability']}), {facts['threads']} threads, torch "
        f"{facts['torch']}, {settings['dtype']}, batch 1, {settings['prompts']} prompts, at most "
        f"{settings['max_new_tokens']} new tokens, commit {facts['commit']}, {facts['date']}. "
        f"`{facts['command']}`",
        "",
        "tau: tokens per target forward. Predicted: speed over `none` by replay and cost table. By the "
        "clock: the same, timed end to end, each arm in turn on every prompt. Draft: milliseconds per "
        "round, learning included. Same: texts equal to those of plain decoding.",
        "",
        "| table | tokens read | pairs | MB | seconds to build |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {t['tokens']:,.0f} | {t['pairs']:,.0f} | {t['megabytes']:.1f} | "
        f"{t['seconds']:.1f} |"
        for name, t in result.tables.items()
    ]
    for temperature, measured in result.measured.items():
        lines += ["", f"## Temperature {temperature}", ""]
        lines += _arms_table(measured, settings["prompts"])
        lines += ["", f"### By task, temperature {temperature}", ""]
        lines += _tasks_table(measured)
    return "\n".join(lines) + "\n"


def _arms_table(measured: dict[str, ArmFigures], num_prompts: int) -> list[str]:
    lines = [
        "| arm | tau | nodes per round | predicted | by the clock | draft, ms | same |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in measured.items():
        clock = "| – | – | – |"
        if m.clocked:
            clock = (
                f"| {m.clocked[ALL_TASKS]:.2f}x | {m.draft_ms:.2f} | "
                f"{m.equal_texts} of {num_prompts} |"
            )
        lines.append(
            f"| {name} | {m.tau[ALL_TASKS]:.2f} | {m.drafted:.1f} | "
            f"{m.predicted[ALL_TASKS]:.2f}x {clock}"
        )
    return lines


def _tasks_table(measured: dict[str, ArmFigures]) -> list[str]:
    tasks = [task for task in measured[NONE].tau if task != ALL_TASKS]
    lines = [
        "| arm | " + " | ".join(f"{task}: tau, predicted, by the clock" for task in tasks) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for name, m in measured.items():
        cells = [
            f"{m.tau[task]:.2f}, {m.predicted[task]:.2f}x, "
            + (f"{m.clocked[task]:.2f}x" if m.clocked else "–")
            for task in tasks
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_figure(result: AdedResult, path: Path) -> None:
    """Write a PNG: tau and predicted speed by node budget and search, and the speeds of the arms."""
    greedy, sampled = result.measured.values()
    budgets = [float(budget) for budget in BUDGETS]
    panels = []
    for label, kind in (
        ("tokens per target forward", "tau"),
        ("predicted speed over none", "predicted"),
    ):
        series = [
            Series(s, budgets, [getattr(greedy[f"{s} {b}"], kind)[ALL_TASKS] for b in BUDGETS])
            for s in SEARCHES
        ]
        panels.append(Panel("", label, series, x_label="nodes", log_x=True))
    names = [name for name, figures in greedy.items() if name != NONE and figures.clocked]
    labels = [f"prompt {name}" if name == LOOKUP else name for name in names]
    series = [
        Series(f"temperature {heat}", labels, [figures[name].clocked[ALL_TASKS] for name in names])
        for heat, figures in (("0", greedy), ("0.8", sampled))
    ]
    panels.append(Panel("", "speed over none, by the clock", series, kind="bars", baseline=1.0))
    facts = result.circumstances
    title = f"{facts['cpu']}, {facts['threads']} threads, {result.settings['dtype']}, batch 1"
    write_figure_of(panels, title, path)
