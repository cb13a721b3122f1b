"""The figures and the page of `unseen.py`, from timings. Runs no model.

A ratio of speeds is one of seconds for the same texts, with a 95% bootstrap interval over prompts.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from result_pages import by_task, page, speeds, table

from paceline.bench.timed import select
from paceline.contracts import AUTO, NONE
from paceline.learning.evaluation.bootstrap import interval, resample
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.bench.timed import Timing
    from paceline.contracts import Completion

    Entry = dict[str, Any]

ALL_TASKS = "all tasks"
SIMPLE = "best single arm without cascades"
SINGLE = "best single arm"
PER_TASK = "best arm of each task, without cascades"
UNTRAINED = "auto, untrained"
RATIO = "{value:.2f} [{low:.2f}, {high:.2f}]"


class Arms(NamedTuple):
    """The best arms by predicted seconds. by_task: without cascades."""

    simple: str
    single: str
    by_task: Mapping[str, str]

    def of(self, task: str) -> dict[str, str]:
        """Return the arm of each fixed method for a task; one without its own gets `simple`."""
        return {
            NONE: NONE,
            SIMPLE: self.simple,
            SINGLE: self.single,
            PER_TASK: self.by_task.get(task, self.simple),
        }


def best_arms(
    arms: Sequence[str], seconds: np.ndarray, domains: Sequence[str], composed: Sequence[int]
) -> Arms:
    """Return the arms that take the least time in all. seconds: [N, A]; composed: the cascades."""
    simple = np.array([i for i in range(len(arms)) if i not in set(composed)])
    of_task = np.array(domains, dtype=str)

    def fastest(rows: np.ndarray, among: np.ndarray) -> str:
        return arms[int(among[rows[:, among].sum(axis=0).argmin()])]

    return Arms(
        simple=fastest(seconds, simple),
        single=fastest(seconds, np.arange(len(arms))),
        by_task={t: fastest(seconds[of_task == t], simple) for t in dict.fromkeys(domains)},
    )


def compare(timings: Sequence[Timing], method: str, reference: str) -> Entry:
    """Return the speed of a method over a reference on the same prompts, as value, low and high."""
    own = {timing.prompt: timing.seconds for timing in select(timings, method)}
    others = {timing.prompt: timing.seconds for timing in select(timings, reference)}
    columns = np.array([[others[prompt], own[prompt]] for prompt in own])
    return ratio_of(columns[:, 0], columns[:, 1])


def ratio_of(reference: np.ndarray, own: np.ndarray) -> Entry:
    """Return sum of reference over sum of own, as value, low and high. Both: [N] seconds."""
    sampled = resample(np.column_stack([reference, own]), [ALL_TASKS] * len(own), seed=0)
    sums, drawn = sampled.sums[0], sampled.drawn[:, 0]  # [2], [B, 2]
    found = interval(sums[0] / sums[1], drawn[:, 0] / drawn[:, 1])
    return {"value": found.value, "low": found.low, "high": found.high}


def compare_by_task(
    timings: Sequence[Timing], method: str, reference: str, apart: str | None
) -> dict[str, Entry]:
    """Return `compare` for all tasks but `apart`, for each of them, and for `apart`."""
    return {
        task: compare(part, method, reference) for task, part in parts_of(timings, apart).items()
    }


def parts_of(timings: Sequence[Timing], apart: str | None) -> dict[str, list[Timing]]:
    """Return the timings of all tasks but `apart`, then of each task, `apart` last if there is any."""
    tasks = list(dict.fromkeys(t.domain for t in timings))
    own = [task for task in tasks if task != apart]
    parts = {ALL_TASKS: [t for t in timings if t.domain != apart]}
    parts |= {task: select(timings, domain=task) for task in own}
    return parts | {task: select(timings, domain=task) for task in tasks if task == apart}


def summarise(timings: Sequence[Timing], arms: Arms, apart: str | None) -> list[Entry]:
    """Return a row per method: speed, speed-up over `none` in all and by task, equal texts.

    All tasks and the worst task are without `apart`.
    """
    among = [timing for timing in timings if timing.domain != apart]
    rows = []
    for method in dict.fromkeys(timing.method for timing in timings):
        by_task = {
            task: entry["value"]
            for task, entry in compare_by_task(timings, method, NONE, apart).items()
        }
        of_tasks = {t: v for t, v in by_task.items() if t not in (ALL_TASKS, apart)}
        whole = speeds(timings, method)
        named = {SIMPLE: f": `{arms.simple}`", SINGLE: f": `{arms.single}`"}
        rows.append(
            {
                "method": method,
                "shown": method + named.get(method, ""),
                "tokens_per_second": speeds(among, method)["tokens_per_second"],
                "over_none": by_task,
                "worst_task": min(of_tasks, key=lambda task: of_tasks[task]),
                "worst": min(of_tasks.values()),
                "equal_to_none": whole["equal_to_none"],
                "prompts": whole["prompts"],
            }
        )
    return rows


def count_arms(completions: Mapping[str, Sequence[Completion]]) -> dict[str, dict[str, int]]:
    """Return by task the chosen arms and the number of requests, the most frequent first."""
    return {
        task: dict(Counter(c.decision.arm for c in of_task).most_common())
        for task, of_task in completions.items()
    }


def differing(rows: Sequence[Entry]) -> list[str]:
    """Return the methods that wrote another text than `none` on any prompt, with their numbers."""
    return [
        f"{row['method']}: {row['prompts'] - row['equal_to_none']} of {row['prompts']}"
        for row in rows
        if row["equal_to_none"] < row["prompts"]
    ]


def draw(result: Entry, path: Path) -> None:
    """Draw the speed of `auto` over each of the others by task, with the intervals."""
    runs = result["runs"]
    figure = import_figure()(figsize=(9, 4 * len(runs)), layout="constrained")
    for axes, run in zip(np.atleast_1d(figure.subplots(len(runs), 1)), runs, strict=True):
        references = [name for name in run["auto_over"] if name != NONE]
        for i, reference in enumerate(references):
            found = run["auto_over"][reference]
            values = np.array([entry["value"] for entry in found.values()])
            low, high = (np.array([e[key] for e in found.values()]) for key in ("low", "high"))
            at = np.arange(len(found)) + (i - (len(references) - 1) / 2) * 0.15
            spread = np.maximum([values - low, high - values], 0.0)
            axes.errorbar(at, values, yerr=spread, fmt="o", markersize=3, label=reference)
        axes.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(found)), list(found))
        axes.set(ylabel="speed of auto over", title=f"{run['dtype']}, 95% intervals over prompts")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def markdown(result: Entry) -> str:
    """Return the page."""
    facts = result["circumstances"]
    lines = page("Unseen prompts by the clock: `auto` next to single arms", facts)
    lines += [
        "No drafter was trained on any of these prompts, and the prompts that are timed are not among "
        "those that were collected to learn from. Every arm but those of `auto` is the one that is "
        "predicted to take the least time on the collected prompts. Speed is tokens over seconds end to "
        "end; intervals are 95% bootstrap intervals over prompts, paired.",
        "",
        *(f"{note}\n" for note in result["notes"]),
    ]
    for run in result["runs"]:
        lines += [f"## {run['dtype']}", ""]
        lines += [*_speeds(run), *_over(run), *_chosen(run), *_left_out(run), *_predicted(run)]
    return "\n".join(lines).rstrip() + "\n"


def _speeds(run: Entry) -> list[str]:
    rows = run["methods"]
    columns = {
        "method": "{shown}",
        "tokens/s": "{tokens_per_second:.0f}",
        **by_task(rows[0], "over_none"),
        "worst task": "{worst:.2f} {worst_task}",
        "same text": "{equal_to_none} of {prompts}",
    }
    tasks = ", ".join(f"{arm} on {task}" for task, arm in run["arms"]["by_task"].items())
    lines = ["Speed over `none`, in all and by task. Tokens/s are of all tasks.", ""]
    lines += [*table(rows, columns), ""]
    return [*lines, f"The {PER_TASK}: {tasks}; elsewhere `{run['arms']['simple']}`.", ""]


def _over(run: Entry) -> list[str]:
    rows = [{"reference": name, **entry} for name, entry in run["auto_over"].items()]
    parts = [key for key in rows[0] if key != "reference"]
    columns = {"over": "{reference}"} | {part: _interval_of(part) for part in parts}
    return ["Speed of `auto` over each of the others.", "", *table(rows, columns), ""]


def _interval_of(key: str) -> str:
    return f"{{{key}[value]:.2f}} [{{{key}[low]:.2f}}, {{{key}[high]:.2f}}]"


def _chosen(run: Entry) -> list[str]:
    lines = ["Choices of `auto`, number of prompts:", ""]
    for task, arms in run["chosen"].items():
        lines.append(f"- {task}: " + ", ".join(f"{arm} {num}" for arm, num in arms.items()))
    return [*lines, ""]


def _left_out(run: Entry) -> list[str]:
    columns = {
        "task": "{task}",
        "best single arm of the others": "{single}",
        "without cascades": "{simple}",
        "`auto` over `none`": _interval_of("over_none"),
        "over the best single arm": _interval_of("over_single"),
        "over the best without cascades": _interval_of("over_simple"),
        "choices": "{choices}",
        "same text": "{same}",
    }
    rows = [
        {
            **row,
            **row["arms"],
            "choices": ", ".join(f"{arm} {num}" for arm, num in row["chosen"].items()),
            "same": f"not {'; '.join(row['differing'])}" if row["differing"] else "all",
        }
        for row in run["left_out"]
    ]
    said = (
        "Tasks that nothing was learned from: the policy and the best single arms are of the other "
        "three tasks, and the lookup has their answers alone. On the three tasks that the policy "
        "learned from, the lookup was replayed with the answers of all four."
    )
    return [said, "", *table(rows, columns), ""]


def _predicted(run: Entry) -> list[str]:
    lines = [
        "Predicted speed over `none` on the same prompts by replay, next to the clocked one. The arms "
        "of each column are chosen, and its policy learned, at its own prices.",
        "",
    ]
    clocked = {row["method"]: row["over_none"] for row in run["methods"]}
    names = {"policy": AUTO}
    for priced in run["predicted"]:
        rows = []
        for name, values in priced["over_none"].items():
            own = clocked.get(names.get(name, name)) if priced["clocked"] else None
            shown = f"{own[ALL_TASKS]:.2f}" if own else "-"
            rows.append({"name": name, "clocked": shown, "values": values})
        columns = {
            f"prices: {priced['prices']}": "{name}",
            **by_task(rows[0], "values"),
            **({"clocked, all tasks": "{clocked}"} if priced["clocked"] else {}),
        }
        over = "; ".join(
            f"{name} {RATIO.format(**entry)}" for name, entry in priced["policy_over"].items()
        )
        lines += [*table(rows, columns), "", f"Predicted speed of the policy over: {over}.", ""]
        lines += [
            f"Best arms: without cascades `{priced['arms']['simple']}`, "
            f"of all `{priced['arms']['single']}`.",
            "",
        ]
    return lines
