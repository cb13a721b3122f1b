"""Progress of long work: a bar with a count, the time spent and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final, Protocol

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS: Final = 60.0  # between two lines of a stage


class Report(Protocol):
    """A `Progress` that may show a figure next to its stage's name."""

    def __call__(self, stage: str, done: int, total: int, figure: str = "") -> None:
        """Show how far a stage is."""
        ...


@contextmanager
def progress(console: Console) -> Iterator[Report]:
    """Yield a function `report(stage, done, total)` that draws one bar per stage.

    Where the output is not a terminal, it prints a line at the beginning and the end of each stage, and
    one a minute in between.
    """
    if console.is_terminal:
        with _bars(console) as report:
            yield report
    else:
        yield _lines(console)


@contextmanager
def _bars(console: Console) -> Iterator[Report]:
    bars = rich.progress.Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int, figure: str = "") -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        name = f"{stage}, {figure}" if figure else stage
        bars.update(tasks[stage], completed=done, total=total, description=name)

    with bars:
        yield report


def _lines(console: Console) -> Report:
    began: dict[str, float] = {}
    printed: dict[str, float] = {}
    ended: set[str] = set()

    def report(stage: str, done: int, total: int, figure: str = "") -> None:
        now = perf_counter()
        if stage not in began:
            began[stage] = printed[stage] = now
            console.print(f"{stage} ...", highlight=False)
        spent = now - began[stage]
        if done >= total and stage not in ended:
            ended.add(stage)
            console.print(f"{stage}: {done} in {spent:.1f} s", highlight=False)
        elif done < total and now - printed[stage] >= _SECONDS:
            printed[stage] = now
            more = f", {figure}" if figure else ""
            console.print(f"{stage}: {done} of {total}, {spent:.0f} s{more}", highlight=False)

    return report
