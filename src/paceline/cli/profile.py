"""`paceline profile`: measure this machine's cost table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.cli import options
from paceline.cli.next_steps import say

if TYPE_CHECKING:
    from paceline.costs import CostTable
    from paceline.terminal import BandedTable


def profile(
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    costs: options.Costs = None,
    dtype: options.Dtype = None,
    exact: options.Exact = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Time the target's and every drafter's real forwards on this machine."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.terminal import BandedTable
    from paceline.verbs.pipeline import profile as run_profile

    settings = options.configured(config, dtype, device, threads, exact, costs=costs)
    console = Console()
    with progress(console) as report:
        table = run_profile(settings, report)
    step = table.seconds("target", "forward", 1, context=128)
    shown = BandedTable(title="milliseconds at context 128")
    for column in ("work", "1 token", "5 tokens", "5 tokens over 1 target token"):
        shown.add_column(column, justify="right" if column != "work" else "left")
    lines = [("target forward", "target", "forward")]
    lines += [(f"{name} propose", name, "propose") for name in settings.drafters]
    for label, subject, operation in lines:
        one = table.seconds(subject, operation, 1, context=128)
        five = table.seconds(subject, operation, 5, context=128)
        shown.add_row(label, f"{one * 1e3:.2f}", f"{five * 1e3:.2f}", f"{five / step:.2f}")
    console.print(shown)
    console.print(_by_rows(table, settings.engine.max_rows))
    if (doubt := table.doubt()) is not None:
        say(console, f"note: {doubt}")
    say(console, f"written: {settings.paths.costs}")


def _by_rows(table: CostTable, most: int) -> BandedTable:
    """Return the cost of a target forward by rows, which shows why drafts are shorter under load."""
    from paceline.terminal import BandedTable

    rows = sorted({min(n, most) for n in (1, 2, 4, 8, 16)})
    shown = BandedTable(title="target forward by rows, milliseconds")
    shown.add_column("context 128")
    for n in rows:
        shown.add_column(str(n), justify="right")
    drafted = {"none drafts": [0] * len(rows), "one drafts 4": [4] * len(rows)}
    drafted["all draft 4"] = [4 * n for n in rows]
    for label, tokens in drafted.items():
        seconds = [
            table.seconds("target", "forward", 1 + k, 128, n)
            for k, n in zip(tokens, rows, strict=True)
        ]
        shown.add_row(label, *(f"{1e3 * s:.2f}" for s in seconds))
    return shown
