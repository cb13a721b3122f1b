"""The output of `paceline distill --from-log`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.next_steps import say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from paceline.config import Config
    from paceline.distillation.comparison import MeasureIntervals
    from paceline.distillation.improve_report import ImproveReport
    from paceline.distillation.train import TrainingProgress
    from paceline.intervals import Interval
    from paceline.terminal import BandedTable

    Follow = Callable[[TrainingProgress], None]


def improve(
    config: Config,
    drafter: str,
    log: Path | None,
    out: Path | None,
    data: Sequence[Path],
    flags: Mapping[str, Any],
    console: Console,
    follow: Callable[[Callable[..., None]], Follow],
) -> None:
    """Train a drafter further on logged requests, and print whether it was adopted.

    follow: makes the function that shows the steps from one that draws a bar.
    """
    from paceline.cli.progress import progress
    from paceline.verbs.improvement import improve_drafter, improve_settings

    settings = improve_settings(config, options.given(dict(flags)), "distill --from-log")
    with progress(console) as report:
        found = improve_drafter(config, drafter, log, out, settings, data, follow(report))
    print_report(found, console)


def print_report(found: ImproveReport, console: Console) -> None:
    """Print the figures of an improvement and what became of it."""
    counts = found.counts
    for reason, count in found.left_out.items():
        say(console, f"note: {count} logged requests {reason}")
    mixed = f", {counts['data']} of them from prompt files" if counts["data"] else ""
    say(
        console,
        f"{counts['conversations']} prompts or conversations: {counts['training']} answers trained on"
        f"{mixed}, {counts['validation']} to validate on, {counts['held_out']} held out",
    )
    console.print(_table(found))
    rise = found.rise.block_efficiency
    if not found.is_adopted:
        say(
            console,
            f"not adopted: the rise of block efficiency is {rise.signed()}, and its interval must be "
            f"above 0; drafter '{found.drafter}' is as before. More requests narrow the interval",
        )
    else:
        say(console, f"adopted: block efficiency rises by {rise.signed()}")
        say(console, f"written: {found.out}; the weights before are in {found.kept}")
    for note in found.notes:
        say(console, f"note: {note}")


def _table(found: ImproveReport) -> BandedTable:
    from paceline.terminal import BandedTable

    table = BandedTable(title=f"drafter '{found.drafter}' on held-out requests")
    for column in ("", "before", "after", "rise (95%)"):
        table.add_column(column, justify="right" if column else "left")
    rows: dict[str, Callable[[MeasureIntervals], Interval | None]] = {
        f"block efficiency, K={found.num_draft_tokens}": lambda own: own.block_efficiency,
        "match rate": lambda own: own.match_rate,
        "acceptance": lambda own: own.acceptance,
    }
    for name, read in rows.items():
        before, after, rise = read(found.before), read(found.after), read(found.rise)
        if before is not None and after is not None and rise is not None:
            table.add_row(name, f"{before.value:.3f}", f"{after.value:.3f}", rise.signed())
    return table
