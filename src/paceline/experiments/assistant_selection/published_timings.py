"""Gains of choosing on published timings of real targets with several drafters.

The timings are those of transformers' assisted generation, one row per prompt (published_timings.csv of
the data folder). No model runs here. `timings.py` computes the numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.experiments.assistant_selection.timings import (
    gains,
    read_timings,
    repeated,
    whole_groups,
)
from paceline.experiments.findings import SHARE, SPEED, Findings, Panel, Series, Table, columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.experiments.assistant_selection.timings import (
        Gains,
        Group,
        Milliseconds,
        Repeated,
        TaskRun,
        TaskTimings,
    )
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench

FILE: Final = "published_timings.csv"
_MOVED: Final = 1.1  # seen gain over fair gain above which an outlier is reported


def run(bench: Workbench) -> Findings:
    """Return the findings. Raises ConfigError if the data folder has no such file."""
    path = bench.data_file(FILE)
    cells = read_timings(path)
    groups = whole_groups(cells)
    found = [gains(group) for group in groups]
    twice = _measured_twice(cells)
    lost = [row for cell, timed in sorted(cells.items()) if (row := _where_none_wins(cell, timed))]
    return Findings(
        tables=[
            _gains_table(groups, found),
            _twice_table(twice),
            _none_table(lost, len(cells)),
        ],
        panels=[_gains_panel(groups, found), _twice_panel(twice)],
        settings={
            "timings": "published runs on GPUs, no model ran here",
            "cells": len(cells),
            "prompts a task": max((len(timed.prompts) for timed in cells.values()), default=0),
        },
        remarks=_remarks(groups, found, twice, len(lost), len(cells)),
        facts={
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "gains": [
                {"target": g.target, "temperature": g.temperature, "run": g.run, **asdict(f)}
                for g, f in zip(groups, found, strict=True)
            ],
            "measured twice": {name: asdict(one) for name, one in twice.items()},
        },
    )


def short(name: str) -> str:
    """Return a model's name without its owner."""
    return name.rpartition("/")[2]


# --- gains of choosing ----------------------------------------------------------------------------


def _gains_table(groups: Sequence[Group], found: Sequence[Gains]) -> Table:
    heads = columns("target", "T", "run", "arms", ("random drafter", SPEED), ("best single", SPEED))
    heads += columns("which", ("best single, fair", SPEED), ("per task", SPEED))
    heads += columns(("per task, fair", SPEED), ("per prompt (oracle)", SPEED))
    rows: list[list[Value]] = []
    for group, gain in zip(groups, found, strict=True):
        row: list[Value] = [short(group.target), group.temperature, group.run[:10], len(group.arms)]
        row += [gain.random, gain.best_single, short(gain.best_arm), gain.best_single_fair]
        rows.append([*row, gain.per_task, gain.per_task_fair, gain.per_prompt])
    explanation = (
        "Speed-up over plain decoding: its mean time per token over that of the chosen arms, with the "
        "same weight for each task; arms, with `none`, that one run measured on all tasks. A random "
        "drafter is never `none`. Fair: chosen on half of the prompts, scored on the other half. The "
        "oracle chooses for each prompt the arm that was fastest in its only measurement, so part of "
        "its gain is noise."
    )
    return Table("Gains of each way of choosing", explanation, heads, rows)


def _gains_panel(groups: Sequence[Group], found: Sequence[Gains]) -> Panel:
    names = [_label(group, groups) for group in groups]
    values = {
        "random drafter": [gain.random for gain in found],
        "best single, fair": [gain.best_single_fair for gain in found],
        "per task, fair": [gain.per_task_fair for gain in found],
        "per prompt (oracle)": [gain.per_prompt for gain in found],
    }
    return _bars("by way of choosing", "speed-up over plain decoding", names, values)


def _bars(title: str, y_label: str, names: list[str], values: dict[str, list[float]]) -> Panel:
    series = [Series(label, names, speeds) for label, speeds in values.items()]
    return Panel(title, y_label, series, kind="bars", baseline=1.0)


def _label(group: Group, groups: Sequence[Group]) -> str:
    """Return target and temperature, and the run's hour where there are several runs."""
    alike = [g for g in groups if (g.target, g.temperature) == (group.target, group.temperature)]
    run = f", {group.run[8:16].replace('_', ' ')}" if len(alike) > 1 else ""
    name = short(group.target).replace("DeepSeek-R1-Distill", "R1").removesuffix("-v0.1")
    return f"{name}, T = {group.temperature}{run}"


# --- gains in a second measurement ----------------------------------------------------------------


def _measured_twice(cells: dict[TaskRun, TaskTimings]) -> dict[str, Repeated]:
    kinds: dict[str, list[tuple[Milliseconds, Milliseconds]]] = defaultdict(list)
    everything = sorted(cells)
    for i, one in enumerate(everything):
        for other in everything[i + 1 :]:
            if (one.target, one.task) != (other.target, other.task):
                continue
            if one.temperature == other.temperature:
                kind = f"another run, T = {one.temperature}"
            elif one.run == other.run:
                kind = "another temperature, same run"
            else:
                continue
            pair = _shared(cells[one], cells[other])
            if pair is not None:
                kinds[kind].append(pair)
    return {kind: repeated(kinds[kind]) for kind in sorted(kinds)}


def _shared(one: TaskTimings, other: TaskTimings) -> tuple[Milliseconds, Milliseconds] | None:
    """Return both on their shared arms and prompts, in units of plain decoding's mean."""
    arms = [arm for arm in one.arms if arm in other.arms]
    prompts = [prompt for prompt in one.prompts if prompt in other.prompts]
    if len(arms) < 2 or not prompts:
        return None
    first, second = one.only(arms, prompts).ms, other.only(arms, prompts).ms
    return first / first[:, 0].mean(), second / second[:, 0].mean()


def _twice_table(twice: dict[str, Repeated]) -> Table:
    heads = columns("chosen in", "prompts", ("per task, seen", SPEED), ("per prompt, seen", SPEED))
    heads += columns(("per task, chosen there", SPEED), ("per prompt, chosen there", SPEED))
    heads += columns(("same best arm", SHARE), ("by chance", SHARE))
    rows: list[list[Value]] = []
    for kind, one in twice.items():
        seen: list[Value] = [kind, one.num_prompts, one.per_task_seen, one.per_prompt_seen]
        rows.append([*seen, one.per_task, one.per_prompt, one.same_choice, one.by_chance])
    explanation = (
        "Prompts that were measured twice: chosen in one measurement and scored in the other, in both "
        "directions, next to the gain of choosing and scoring in the same one (seen). Every task of "
        "every target has the same weight, in units of its plain decoding, so the level differs from "
        "the first table. By chance: how often the best arms of a prompt would agree if prompts did not "
        "matter."
    )
    return Table("The oracle in a second measurement", explanation, heads, rows)


def _twice_panel(twice: dict[str, Repeated]) -> Panel:
    names = [kind.replace(", ", ",\n") for kind in twice]
    values = {
        "per task, seen": [one.per_task_seen for one in twice.values()],
        "per task, chosen there": [one.per_task for one in twice.values()],
        "per prompt, seen": [one.per_prompt_seen for one in twice.values()],
        "per prompt, chosen there": [one.per_prompt for one in twice.values()],
    }
    return _bars(
        "chosen in a second measurement", "speed-up, same weight for each task", names, values
    )


# --- plain decoding as the best arm ---------------------------------------------------------------


def _where_none_wins(cell: TaskRun, timed: TaskTimings) -> list[Value] | None:
    """Return a row if plain decoding has the best mean or is the best for half of the prompts."""
    share = float((timed.ms.argmin(axis=1) == 0).mean())
    means = timed.ms.mean(axis=0)
    best = 1 + int(means[1:].argmin())
    if means[0] > means[best] and share < 0.5:
        return None
    row: list[Value] = [short(cell.target), cell.temperature, short(cell.task), cell.run[:10]]
    return [*row, len(timed.arms), share, short(timed.arms[best]), float(means[0] / means[best])]


def _none_table(rows: list[list[Value]], num_cells: int) -> Table:
    heads = columns("target", "T", "task", "run", "arms", ("`none` fastest", SHARE), "best drafter")
    heads += columns(("its speed-up", SPEED))
    explanation = (
        f"Of {num_cells} cells (a run, a target, a temperature, a task), those where plain decoding "
        "has the best mean or is the fastest arm for at least half of the prompts."
    )
    return Table("Where `none` is best", explanation, heads, rows)


def _remarks(
    groups: Sequence[Group],
    found: Sequence[Gains],
    twice: dict[str, Repeated],
    num_lost: int,
    num_cells: int,
) -> list[str]:
    if not found:
        return ["No run measured a drafter on every task, so nothing can be compared over tasks."]
    by_task = [gain.per_task_fair / gain.best_single_fair for gain in found]
    by_prompt = [gain.per_prompt / gain.per_task_fair for gain in found]
    worst = min(range(len(found)), key=lambda i: found[i].random)
    remarks = [
        f"Choosing per task over the best single arm, fair: {min(by_task):.2f}x to "
        f"{max(by_task):.2f}x, above 1.05x in {sum(g > 1.05 for g in by_task)} of {len(found)} groups.",
        f"The per-prompt oracle over that: {min(by_prompt):.2f}x to {max(by_prompt):.2f}x, noise "
        "included.",
        f"A random drafter is slower than plain decoding in {sum(g.random < 1 for g in found)} of "
        f"{len(found)} groups, at {found[worst].random:.2f}x for {short(groups[worst].target)} at T = "
        f"{groups[worst].temperature}.",
        f"`none` is best in {num_lost} of {num_cells} cells, so it must be an arm.",
    ]
    for kind, one in twice.items():
        remarks.append(
            f"Chosen in {kind}: per prompt {one.per_prompt:.2f}x, per task {one.per_task:.2f}x; in the "
            f"same measurement the oracle gains {one.per_prompt_seen:.2f}x."
        )
    remarks += [
        line for group, gain in zip(groups, found, strict=True) if (line := _outlier(group, gain))
    ]
    arms = Counter(short(arm) for gain in found for arm in gain.per_task_arms.values())
    counted = ", ".join(f"{name} {number}" for name, number in arms.most_common())
    return [*remarks, f"Best arm of a task, by groups and tasks: {counted}."]


def _outlier(group: Group, gain: Gains) -> str | None:
    """Describe the time farthest from its median where choosing fairly loses much, else return None."""
    if gain.best_single < _MOVED * gain.best_single_fair:
        return None
    times = [
        (float(ms.max() / median), task, arm, float(ms.max()), float(median))
        for task, table in group.tasks.items()
        for arm, ms in zip(group.arms, table.T, strict=True)
        for median in [np.median(ms)]
    ]
    _, task, arm, most, median = max(times)
    return (
        f"For {short(group.target)} at T = {group.temperature} the fair best single arm is at "
        f"{gain.best_single_fair:.2f}x, not {gain.best_single:.2f}x: one prompt of {short(task)} took "
        f"{short(arm)} {most:,.0f} ms per token (median {median:.0f}), which decides means of few "
        "prompts."
    )
