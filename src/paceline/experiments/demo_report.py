"""The demo's result as tables for the terminal, a PNG figure and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import yaml

from paceline.contracts import AUTO, NONE
from paceline.experiments.demo_job import ALL_TASKS, ORACLE, RANDOM, DemoResult
from paceline.store import write_atomically
from paceline.terminal import PROSE, BandedTable

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.config import Config

# no green: that is the policy's
_COLOURS: Final = (
    "#3b6ea5", "#8cb6d9", "#c44e52", "#eba3a5", "#7a5ba6", "#c3aed6", "#8c6d46", "#5f9ea0",
)  # fmt: skip
_OF_DEMO: Final = "# The demo's models with what the demo collected, measured and learned.\n"


def table(result: DemoResult) -> BandedTable:
    """Show speed: one row per arm, one column per task and one for all."""
    shown = _by_task("tokens/s, and the speed-up over none", result)
    shown.caption = (
        "oracle: per request the arm that replay predicts to be fastest, its clocked time"
    )
    for method, style in _methods(result).items():
        cells = [by_method[method] for by_method in result.cells.values()]
        speeds = [f"{cell.tokens_per_second:.0f} {cell.speedup:.2f}x" for cell in cells]
        shown.add_row(method, *speeds, style=style)
    return shown


def accepted_table(result: DemoResult) -> BandedTable:
    """Show block efficiency, and how many texts equal those of `none`, in the same rows and columns."""
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
    """Return every way of decoding with the style of its row."""
    special = {AUTO: "bold green", NONE: "dim", ORACLE: "dim"}
    return {method: special.get(method, "") for method in result.cells[ALL_TASKS]}


def chosen_table(result: DemoResult) -> BandedTable:
    """Show the arms that the policy chose, by task."""
    shown = BandedTable(title="what auto chose")
    shown.add_column("task")
    shown.add_column("arm (requests)", overflow=PROSE)
    for task, arms in result.chosen.items():
        shown.add_row(task, ", ".join(f"{arm} ({n})" for arm, n in arms.items()))
    return shown


def sentences(result: DemoResult) -> list[str]:
    """What the table says, in words."""
    overall = result.cells[ALL_TASKS]
    auto, best = overall[AUTO], result.best_single
    versus = (result.auto_over_best_single - 1) * 100
    lines = [
        f"auto decodes {auto.speedup:.2f} times as fast as none; the best single drafter, {best}, "
        f"{overall[best].speedup:.2f} times.",
        f"auto is {abs(versus):.0f}% {'faster' if versus >= 0 else 'slower'} than {best} for "
        f"everything, and reaches {result.auto_over_oracle:.0%} of the per-request oracle "
        f"({overall[ORACLE].speedup:.2f} times none).",
    ]
    worst = min((c[AUTO].speedup, task) for task, c in result.cells.items())
    lines.append(f"its slowest task is {worst[1]}: {worst[0]:.2f} times none.")
    dtype = result.settings["dtype"]
    if dtype == "float32" or result.settings["exact"]:
        mode = ", exact mode" if result.settings["exact"] else ""
        lines.append(
            f"Decoded in {dtype}{mode}: {auto.equal_texts} of {auto.prompts} texts equal plain ones."
        )
    else:
        different = auto.prompts - auto.equal_texts
        lines.append(
            f"Decoded in {dtype} for speed, where a verification of several tokens rounds "
            f"differently from one token: {different} of {auto.prompts} texts of auto differ from "
            "plain decoding's. With --exact, or in float32, they are all equal."
        )
    return lines


def write_json(result: DemoResult, path: Path) -> None:
    write_atomically(path, json.dumps(asdict(result), indent=1).encode() + b"\n")


def write_config(config: Config, path: Path) -> None:
    """Write a configuration as YAML for every verb, without the defaults."""
    raw = config.model_dump(mode="json", exclude_defaults=True)
    text = _OF_DEMO + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    write_atomically(path, text.encode())


def is_of_demo(path: Path) -> bool:
    """Whether `write_config` wrote this file, so that another demo may replace it."""
    return path.read_bytes().startswith(_OF_DEMO.encode())


def write_figure(result: DemoResult, path: Path) -> None:
    """Speed-up over none, a group of bars for every task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = [m for m in result.cells[ALL_TASKS] if m != NONE]
    tasks = list(result.cells)
    special = {AUTO: "#1a7f37", ORACLE: "#bbbbbb", RANDOM: "#d9b44a"}
    figure, axes = plt.subplots(figsize=(11, 4.6), layout="constrained")
    width = 0.85 / len(methods)
    for i, method in enumerate(methods):
        places = [t + (i - (len(methods) - 1) / 2) * width for t in range(len(tasks))]
        heights = [result.cells[task][method].speedup for task in tasks]
        axes.bar(
            places,
            heights,
            width,
            label=method,
            color=special.get(method, _COLOURS[i % len(_COLOURS)]),
        )
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("speed-up over none, by the clock")
    facts, settings = result.circumstances, result.settings
    axes.set_title(
        f"{facts['cpu']}, {facts['threads']} threads, {settings['dtype']}, "
        f"{settings['timed_prompts']} prompts, greedy, batch 1",
        fontsize=10,
    )
    axes.legend(ncols=1, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
