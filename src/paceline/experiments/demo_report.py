"""The result of the demo as tables for the terminal, a PNG figure and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import yaml

from paceline.contracts import AUTO, NONE
from paceline.experiments.demo_job import ALL_TASKS, ORACLE, RANDOM, DemoResult
from paceline.experiments.findings import Panel, Series
from paceline.experiments.report import write_figure as write_figure_of
from paceline.files import write_atomically
from paceline.terminal import PROSE, BandedTable

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.config import Config

# without green, which is the colour of the policy
_COLOURS: Final = (
    "#3b6ea5", "#8cb6d9", "#c44e52", "#eba3a5", "#7a5ba6", "#c3aed6", "#8c6d46", "#5f9ea0",
)  # fmt: skip
_SPECIAL_COLOURS: Final = {AUTO: "#1a7f37", ORACLE: "#bbbbbb", RANDOM: "#d9b44a"}
_OF_DEMO: Final = "# The demo's models with what the demo collected, measured and learned.\n"


def table(result: DemoResult) -> BandedTable:
    """Return the table of speeds: one row per method, one column per task and one for all."""
    shown = _by_task("tokens/s, and the speed-up over none", result)
    shown.caption = (
        "oracle: the clocked time of the arm that replay predicts to be fastest for the request"
    )
    for method, style in _methods(result).items():
        cells = [by_method[method] for by_method in result.cells.values()]
        speeds = [f"{cell.tokens_per_second:.0f} {cell.speedup:.2f}x" for cell in cells]
        shown.add_row(method, *speeds, style=style)
    return shown


def accepted_table(result: DemoResult) -> BandedTable:
    """Return the table of block efficiencies and of texts that equal those of `none`."""
    shown = _by_task("tokens per target forward, and texts equal to those of none", result)
    for method, style in _methods(result).items():
        if method == ORACLE:
            continue  # its runs are those of the arms
        cells = [by_method[method] for by_method in result.cells.values()]
        found = [f"{c.block_efficiency:.2f} {c.equal_texts}/{c.prompts}" for c in cells]
        shown.add_row(method, *found, style=style)
    return shown


def _by_task(title: str, result: DemoResult) -> BandedTable:
    shown = BandedTable(title=title)
    shown.add_column("arm")
    for task in result.cells:
        shown.add_column(task, justify="right")
    return shown


def _methods(result: DemoResult) -> dict[str, str]:
    special = {AUTO: "bold green", NONE: "dim", ORACLE: "dim"}
    return {method: special.get(method, "") for method in result.cells[ALL_TASKS]}


def chosen_table(result: DemoResult) -> BandedTable:
    """Return the table of the arms that the policy chose, by task."""
    shown = BandedTable(title="choices of auto")
    shown.add_column("task")
    shown.add_column("arm (requests)", overflow=PROSE)
    for task, arms in result.chosen.items():
        shown.add_row(task, ", ".join(f"{arm} ({n})" for arm, n in arms.items()))
    return shown


def sentences(result: DemoResult) -> list[str]:
    """Return the main results as sentences."""
    overall = result.cells[ALL_TASKS]
    auto, best = overall[AUTO], result.best_single
    versus = (result.auto_over_best_single - 1) * 100
    lines = [
        f"auto decodes {auto.speedup:.2f} times as fast as none; the best single drafter, {best}, "
        f"{overall[best].speedup:.2f} times.",
        f"auto is {abs(versus):.0f}% {'faster' if versus >= 0 else 'slower'} than {best} for "
        f"all requests, and reaches {result.auto_over_oracle:.0%} of the per-request oracle "
        f"({overall[ORACLE].speedup:.2f} times none).",
    ]
    worst = min((c[AUTO].speedup, task) for task, c in result.cells.items())
    lines.append(f"its slowest task is {worst[1]}: {worst[0]:.2f} times none.")
    dtype = result.settings["dtype"]
    if dtype == "float32" or result.settings["exact"]:
        mode = ", exact" if result.settings["exact"] else ""
        lines.append(
            f"Decoded in {dtype}{mode}: {auto.equal_texts} of {auto.prompts} texts equal those of none."
        )
    else:
        different = auto.prompts - auto.equal_texts
        lines.append(
            f"Decoded in {dtype}, in which the verification of several tokens rounds differently from "
            f"one token: {different} of {auto.prompts} texts of auto differ from those of none. On "
            "the compiled forward, or in float32, all texts are equal."
        )
    return lines


def write_json(result: DemoResult, path: Path) -> None:
    """Write the whole result."""
    write_atomically(path, json.dumps(asdict(result), indent=1).encode() + b"\n")


def write_config(config: Config, path: Path) -> None:
    """Write a configuration as YAML for every verb, without the defaults."""
    raw = config.model_dump(mode="json", exclude_defaults=True)
    text = _OF_DEMO + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    write_atomically(path, text.encode())


def is_of_demo(path: Path) -> bool:
    """Return True if `write_config` wrote this file, so that another demo may replace it."""
    return path.read_bytes().startswith(_OF_DEMO.encode())


def write_figure(result: DemoResult, path: Path) -> None:
    """Write a PNG of the speed-ups over none, a group of bars per task."""
    tasks = list(result.cells)
    methods = [method for method in result.cells[ALL_TASKS] if method != NONE]
    series = [Series(m, tasks, [result.cells[t][m].speedup for t in tasks]) for m in methods]
    panel = Panel("", "speed-up over none, by the clock", series, kind="bars", baseline=1.0)
    facts, settings = result.circumstances, result.settings
    title = (
        f"{facts['cpu']}, {facts['threads']} threads, {settings['dtype']}, "
        f"{settings['timed_prompts']} prompts, greedy, batch 1"
    )
    colours = {m: _COLOURS[i % len(_COLOURS)] for i, m in enumerate(methods)} | _SPECIAL_COLOURS
    write_figure_of([panel], title, path, colours)
