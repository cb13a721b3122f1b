"""The course of a training: a PNG of its curves, and event files for TensorBoard.

Both are made from a run's history, a list of plain dictionaries with one entry per validation: `step`,
counted through all phases, `phase`, `train_loss`, `tokens_per_second`, and what `Measures.to_history`
returns. An entry may lack a figure; a curve has the entries that have it. Knows no training.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from paceline.errors import ConfigError
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Entry = Mapping[str, Any]

EXTRA: Final = "train"
"""The extra of paceline that installs what this module needs."""
MEAN: Final = "mean"
_DOMAINS: Final = "domains"
_LENGTHS: Final = ("1", "2", "4", "8", "16")  # draft lengths with an event of their own


def points(history: Sequence[Entry], *keys: str, task: str = MEAN) -> tuple[list[int], list[float]]:
    """Return the steps and values of a curve: of the mean, or of a task.

    keys: the path to the figure in an entry, such as `block_efficiency`, `4`. Entries without it, or
    where it is not finite, are left out.
    """
    steps, values = [], []
    for entry in history:
        value = _find(entry, keys, task)
        if value is not None:
            steps.append(int(entry["step"]))
            values.append(value)
    return steps, values


def _find(entry: Entry, keys: Sequence[str], task: str = MEAN) -> float | None:
    found: Any = entry if task == MEAN else entry.get(_DOMAINS, {}).get(task)
    for key in keys:
        found = found.get(key) if hasattr(found, "get") else None
    is_number = isinstance(found, int | float) and math.isfinite(found)
    return float(found) if is_number else None


def tasks_of(history: Sequence[Entry]) -> list[str]:
    """Return the tasks of all entries, in alphabetical order."""
    return sorted({task for entry in history for task in entry.get(_DOMAINS, {})})


# --- the figure -----------------------------------------------------------------------------------


def plot_curves(history: Sequence[Entry], path: Path, title: str = "") -> None:
    """Write the curves of a training as a PNG: loss, acceptance, block efficiency and speed-up.

    The block efficiency is at the best draft length of the last entry that names one. Raises ConfigError
    without matplotlib, or if the history has no entry.
    """
    make_figure = import_figure(EXTRA)
    if not history:
        raise ConfigError("the training has no validation yet, so it has no curve; train longer")
    length = next((e["num_draft_tokens"] for e in reversed(history) if "num_draft_tokens" in e), 4)
    figure = make_figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    loss, acceptance, efficiency, speedup = panels.flat
    _draw_tasks(loss, history, "loss")
    _draw(loss, history, "train_loss", label="training", style="--")
    loss.set(title="loss", ylabel="nats per token")
    _draw_tasks(acceptance, history, "match_rate")
    _draw(acceptance, history, "acceptance", label="mean under sampling", style=":")
    acceptance.set(title="acceptance per position", ylabel="share of positions")
    _draw_tasks(efficiency, history, "block_efficiency", str(length))
    efficiency.set(title=f"block efficiency, K = {length}", ylabel="tokens per target forward")
    _draw_tasks(speedup, history, "predicted_speedup")
    speedup.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
    is_priced = any(entry.get("is_priced") for entry in history)
    source = "measured prices" if is_priced else "parameters only"
    speedup.set(title=f"predicted speed-up ({source})", ylabel="over plain decoding")
    for axes in (efficiency, speedup):
        axes.set_xlabel("step")
    named: dict[str, Any] = {}
    for axes in (acceptance, loss, efficiency, speedup):
        _finish(axes, history, is_labelled=axes is loss)
        lines, names = axes.get_legend_handles_labels()
        named |= dict(zip(names, lines, strict=True))
    if named:
        figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False)
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_tasks(axes: Any, history: Sequence[Entry], *keys: str) -> None:
    """Draw a curve per task, in the task's colour of every panel, and the mean in black."""
    tasks = tasks_of(history)
    for place, task in enumerate(tasks):
        steps, values = points(history, *keys, task=task)
        _plot(axes, steps, values, color=f"C{place % 10}", label=task, linewidth=1.3)
    if len(tasks) != 1:
        _draw(axes, history, *keys, label="mean over tasks")


def _draw(axes: Any, history: Sequence[Entry], *keys: str, label: str, style: str = "-") -> None:
    steps, values = points(history, *keys)
    _plot(axes, steps, values, color="black", label=label, linewidth=2.0, linestyle=style)


def _plot(axes: Any, steps: list[int], values: list[float], **look: Any) -> None:
    if steps:
        # a single validation has no line
        axes.plot(steps, values, marker="o" if len(steps) == 1 else None, **look)


def _finish(axes: Any, history: Sequence[Entry], is_labelled: bool) -> None:
    """Mark the beginnings of phases, and remove the frame."""
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # a phase begins at the last validation of the phase before it
    begins = [history[0]["step"]]
    names = [history[0].get("phase")]
    for before, after in pairwise(history):
        if after.get("phase") != before.get("phase"):
            begins.append(before["step"])
            names.append(after.get("phase"))
            axes.axvline(before["step"], color="0.6", linewidth=0.8)
    for step, name in zip(begins, names, strict=True) if is_labelled and len(names) > 1 else ():
        axes.annotate(
            f" {name}", (step, 1.0), xycoords=("data", "axes fraction"),
            va="top", fontsize="small", color="0.4",
        )  # fmt: skip


# --- TensorBoard ----------------------------------------------------------------------------------


def check_extras(has_events: bool) -> None:
    """Raise ConfigError without what the figure, and the events if any, are written with.

    Called before a training, which would otherwise end without them.
    """
    import_figure(EXTRA)
    if has_events:
        _import_writer()


def _import_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"event files need TensorBoard; install it with: pip install 'paceline[{EXTRA}]', or set "
            "events to null"
        ) from error
    return SummaryWriter


class EventLog:
    """TensorBoard's event files of a training, written while it runs."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        """Open a folder; several runs below one parent are shown together.

        first_step: of a continued training; events of the folder from there on are hidden. Raises
        ConfigError without TensorBoard.
        """
        self._writer: Any = _import_writer()(str(folder), purge_step=first_step or None)

    def add(self, entry: Entry) -> None:
        """Write the figures of an entry of a history."""
        step = int(entry["step"])
        for tag, value in scalars(entry).items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def write_events(history: Sequence[Entry], folder: Path) -> None:
    """Write a whole history as event files into a folder. Raises ConfigError without TensorBoard."""
    log = EventLog(folder)
    try:
        for entry in history:
            log.add(entry)
    finally:
        log.close()


def scalars(entry: Entry) -> dict[str, float]:
    """Return the figures of an entry by TensorBoard's tag, `figure/task`."""
    tags: dict[str, float | None] = {
        "loss/training": _find(entry, ["train_loss"]),
        "training/tokens_per_second": _find(entry, ["tokens_per_second"]),
        "training/num_draft_tokens": _find(entry, ["num_draft_tokens"]),
    }
    for task in (MEAN, *tasks_of([entry])):
        for figure in ("loss", "match_rate", "acceptance", "predicted_speedup"):
            tags[f"{figure}/{task}"] = _find(entry, [figure], task)
        for figure in ("block_efficiency", "mbsu"):
            for length in _LENGTHS:
                tags[f"{figure}_{length}/{task}"] = _find(entry, [figure, length], task)
    return {tag: value for tag, value in tags.items() if value is not None}
