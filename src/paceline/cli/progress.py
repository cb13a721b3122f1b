"""Progress of long work: a bar with a count, the time spent and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

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

from paceline.contracts import Progress


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """Yield a function `report(stage, done, total)` that draws one bar per stage.

    Where the output is not a terminal, it prints a line at the beginning and the end of each stage.
    """
    if console.is_terminal:
        with _bars(console) as report:
            yield report
    else:
        yield _lines(console)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    bars = rich.progress.Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield report


def _lines(console: Console) -> Progress:
    began: dict[str, float] = {}
    ended: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in began:
            began[stage] = perf_counter()
            console.print(f"{stage} ...", highlight=False)
        if done >= total and stage not in ended:
            ended.add(stage)
            spent = perf_counter() - began[stage]
            console.print(f"{stage}: {done} in {spent:.1f} s", highlight=False)

    return report
