"""The demo's result as a table for the terminal, a PNG figure and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from rich.table import Table

from paceline.contracts import AUTO, NONE
from paceline.experiments.demo_job import ALL_TASKS, ORACLE, RANDOM, Cell, DemoResult
from paceline.store import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

# no green: that is the policy's
_COLOURS: Final = (
    "#3b6ea5", "#8cb6d9", "#c44e52", "#eba3a5", "#7a5ba6", "#c3aed6", "#8c6d46", "#5f9ea0",
)  # fmt: skip


def table(result: DemoResult) -> Table:
    """A row for every task and one for all, a column for every arm."""
    methods = list(result.cells[ALL_TASKS])
    shown = Table(
        title="tokens/s, speed-up over none, block efficiency, texts equal to none's",
        caption="oracle: per request the arm that replay predicts to be fastest, its clocked time",
        pad_edge=False,
    )
    shown.add_column("task")
    for method in methods:
        style = {AUTO: "bold green", NONE: "dim", ORACLE: "dim"}.get(method, "")
        shown.add_column(method, justify="right", style=style)
    for task, cells in result.cells.items():
        if task == ALL_TASKS:
            shown.add_section()
        shown.add_row(f"[bold]{task}[/]", *(_cell_text(m, cells[m]) for m in methods))
    return shown


def _cell_text(method: str, cell: Cell) -> str:
    lines = [f"{cell.tokens_per_second:.0f}", f"{cell.speedup:.2f}x"]
    lines.append(f"{cell.block_efficiency:.2f}" if method != ORACLE else "")
    lines.append(f"{cell.equal_texts}/{cell.prompts}")
    return "\n".join(lines)


def chosen_table(result: DemoResult) -> Table:
    """Which arms the policy gave its requests to."""
    shown = Table(title="what auto chose", pad_edge=False)
    shown.add_column("task")
    shown.add_column("arm (requests)")
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
