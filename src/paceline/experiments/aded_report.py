"""The tri-gram experiment's result as JSON, as markdown and as a figure."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from paceline.contracts import NONE
from paceline.experiments.aded import ALL_TASKS, BUDGETS, LOOKUP, SEARCHES
from paceline.store import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.experiments.aded import AdedResult, ArmFigures


def write_report(result: AdedResult, folder: Path) -> str:
    """aded.json, aded.md and aded.png in a folder; returns the markdown."""
    text = markdown(result)
    data = json.dumps(asdict(result), indent=1).encode() + b"\n"
    write_atomically(folder / "aded.json", data)
    write_atomically(folder / "aded.md", text.encode())
    write_figure(result, folder / "aded.png")
    return text


def markdown(result: AdedResult) -> str:
    facts, settings = result.circumstances, result.settings
    lines = [
        f"{facts['cpu']} ({facts['cpu_capability']}), {facts['threads']} threads, torch "
        f"{facts['torch']}, {settings['dtype']}, batch 1, {settings['prompts']} prompts, at most "
        f"{settings['max_new_tokens']} new tokens, commit {facts['commit']}, {facts['date']}. "
        f"`{facts['command']}`",
        "",
        "tau: tokens a target forward. Predicted: speed over `none` by replay and cost table. By the "
        "clock: the same, timed end to end, each arm in turn on every prompt. Draft: milliseconds a "
        "round, learning included. Same: texts equal to plain decoding's.",
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
        "| arm | tau | nodes a round | predicted | by the clock | draft, ms | same |",
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
    """Left: tau and predicted speed by node budget, a line a search. Right: the other arms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    greedy, sampled = result.measured.values()
    for search in SEARCHES:
        names = [f"{search} {budget}" for budget in BUDGETS]
        left.plot(BUDGETS, [greedy[n].tau[ALL_TASKS] for n in names], marker="o", label=search)
        speeds = [greedy[n].predicted[ALL_TASKS] for n in names]
        middle.plot(BUDGETS, speeds, marker="o", label=search)
    for axes, label in ((left, "tokens a target forward"), (middle, "predicted speed over none")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        axes.set_xlabel("nodes")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    names = [name for name, m in greedy.items() if name != NONE and m.clocked]
    places = range(len(names))
    right.barh(
        [p + 0.2 for p in places],
        [greedy[n].clocked[ALL_TASKS] for n in names],
        0.4,
        label="temperature 0",
        color="#3b6ea5",
    )
    right.barh(
        [p - 0.2 for p in places],
        [sampled[n].clocked[ALL_TASKS] for n in names],
        0.4,
        label="temperature 0.8",
        color="#eba3a5",
    )
    labels = [f"prompt {name}" if name == LOOKUP else name for name in names]
    right.set_yticks(places, labels, fontsize=8)
    right.invert_yaxis()
    right.axvline(1.0, color="black", linewidth=1, linestyle="--")
    right.set_xlabel("speed over none, by the clock")
    right.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    facts = result.circumstances
    figure.suptitle(
        f"{facts['cpu']}, {facts['threads']} threads, {result.settings['dtype']}, batch 1",
        fontsize=10,
    )
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
