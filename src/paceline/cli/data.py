"""`paceline data`: the rows of a collection and the gains of its drafters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.cli import options
from paceline.cli.next_steps import say

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.terminal import BandedTable
    from paceline.verbs.data import DataReport


def data(
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    store: options.Store = None,
    costs: options.Costs = None,
    as_json: options.AsJson = False,
    plot: options.Plot = None,
) -> None:
    """Show a collection's rows and tasks, acceptance by drafter, and the fastest drafters."""
    from rich.console import Console

    from paceline.verbs.data import data as run_data
    from paceline.verbs.data import plot_collection

    report = run_data(options.configured(config, store=store, costs=costs))
    console = Console()
    if as_json:
        console.print_json(report.to_json())
    else:
        _print(console, report)
    if plot is not None:
        plot_collection(report, plot)
        if not as_json:
            say(console, f"written: {plot}")


def _print(console: Console, report: DataReport) -> None:
    _print_tasks(console, report)
    if report.acceptance:
        _print_acceptance(console, report)
        _print_overlap(console, report)
    if report.oracle:
        _print_oracle(console, report)
    for name, count in report.writers.items():
        say(console, f"outputs of {name}: {count} rows")
    for note in report.notes:
        say(console, f"note: {note}")


def _print_tasks(console: Console, report: DataReport) -> None:
    from paceline.terminal import PROSE
    from paceline.verbs.data import ALL

    table = _table("collected rows (a row is a prompt under a sampling)", "task")
    table.add_column("samplings", overflow=PROSE)
    for column in ("prompts", "rows", "prompt tokens", "output tokens", "output total"):
        table.add_column(column, justify="right")
    for task, own in report.tasks.items():
        if task == ALL:
            table.add_section()
        samplings = ", ".join(f"{name} {count}" for name, count in own.samplings.items())
        counts = (own.num_prompts, own.num_rows, own.prompt_tokens, own.output_tokens)
        table.add_row(task, samplings, *map(str, counts), f"{own.total_output_tokens:,}")
    console.print(table)


def _print_acceptance(console: Console, report: DataReport) -> None:
    table = _table("tokens per round (first drafted token right)", "drafter", *report.tasks)
    for name, by_task in report.acceptance.items():
        cells = []
        for own in (by_task[task] for task in report.tasks):
            match = "-" if own.match is None else f"{own.match:.0%}"
            cells.append(f"{own.tokens_per_round:.2f} ({match})")
        table.add_row(name, *cells)
    console.print(table)


def _print_overlap(console: Console, report: DataReport) -> None:
    """Print the overlaps of the drafters whose distributions were compared with the target's."""
    scored = {
        name: by_task
        for name, by_task in report.acceptance.items()
        if any(own.overlap is not None for own in by_task.values())
    }
    if not scored:
        return
    title = "overlap with the target's distribution: sum min(p, q)"
    table = _table(title, "drafter", *report.tasks)
    for name, by_task in scored.items():
        overlaps = [by_task[task].overlap for task in report.tasks]
        table.add_row(name, *("-" if one is None else f"{one:.2f}" for one in overlaps))
    console.print(table)


def _print_oracle(console: Console, report: DataReport) -> None:
    from paceline.contracts import NONE
    from paceline.verbs.data import shares_by_drafter

    title = "predicted: the fastest drafter of each row, at its best length"
    table = _table(title, "drafter", *report.oracle)
    shares = [shares_by_drafter(oracle) for oracle in report.oracle.values()]
    for name in (NONE, *report.acceptance):
        table.add_row(name, *(f"{own[name]:.0%}" if name in own else "" for own in shares))
    table.add_section()
    table.add_row("over none", *(f"{oracle.speedup:.2f}x" for oracle in report.oracle.values()))
    console.print(table)


def _table(title: str, first: str, *figures: str) -> BandedTable:
    from paceline.terminal import BandedTable

    table = BandedTable(title=title, title_justify="left")
    table.add_column(first)
    for column in figures:
        table.add_column(column, justify="right")
    return table
