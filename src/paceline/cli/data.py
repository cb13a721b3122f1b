"""`paceline data`: what a collection holds, and what its drafters would bring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.options import DEFAULT_CONFIG, ConfigOption, configured

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.experiments.data_report import DataReport


def data(
    config: ConfigOption = DEFAULT_CONFIG,
    store: Annotated[Path | None, typer.Option(help="Folder of the collection.")] = None,
    costs: Annotated[Path | None, typer.Option(help="File of the cost table.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a figure to this PNG.")] = None,
) -> None:
    """Show a collection's rows and tasks, acceptance by drafter, and who would be fastest."""
    from rich.console import Console

    from paceline.experiments.data_report import plot as write_plot
    from paceline.experiments.pipeline import data as describe

    report = describe(configured(config, store=store, costs=costs))
    console = Console()
    if as_json:
        console.print_json(report.to_json())
    else:
        _print(console, report)
    if plot is not None:
        write_plot(report, plot)
        if not as_json:
            console.print(f"written: {plot}")


def _print(console: Console, report: DataReport) -> None:
    _print_tasks(console, report)
    if report.acceptance:
        _print_acceptance(console, report)
        _print_overlap(console, report)
    if report.oracle:
        _print_oracle(console, report)
    for name, count in report.writers.items():
        console.print(f"outputs written by {name}: to {count} rows", highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _print_tasks(console: Console, report: DataReport) -> None:
    table = _table("collected rows, a row is a prompt under a sampling", "task", "samplings")
    for column in ("prompts", "rows", "prompt tokens", "output tokens", "output total"):
        table.add_column(column, justify="right")
    for task, own in report.tasks.items():
        _before_all(table, task)
        samplings = ", ".join(f"{name} {count}" for name, count in own.samplings.items())
        counts = (own.num_prompts, own.num_rows, own.prompt_tokens, own.output_tokens)
        table.add_row(task, samplings, *map(str, counts), f"{own.total_output_tokens:,}")
    console.print(table)


def _print_acceptance(console: Console, report: DataReport) -> None:
    table = _table("tokens a round (first drafted token right)", "task")
    for name in report.acceptance:
        table.add_column(name, justify="right")
    for task in report.tasks:
        _before_all(table, task)
        cells = []
        for by_task in report.acceptance.values():
            own = by_task[task]
            match = "-" if own.match is None else f"{own.match:.0%}"
            cells.append(f"{own.tokens_per_round:.2f} ({match})")
        table.add_row(task, *cells)
    console.print(table)


def _print_overlap(console: Console, report: DataReport) -> None:
    """Of the drafters whose distributions were compared with the target's."""
    scored = {
        name: by_task
        for name, by_task in report.acceptance.items()
        if any(own.overlap is not None for own in by_task.values())
    }
    if not scored:
        return
    table = _table("how much of the target's distribution a drafter covers: sum min(p, q)", "task")
    for name in scored:
        table.add_column(name, justify="right")
    for task in report.tasks:
        _before_all(table, task)
        overlaps = [by_task[task].overlap for by_task in scored.values()]
        table.add_row(task, *("-" if one is None else f"{one:.2f}" for one in overlaps))
    console.print(table)


def _print_oracle(console: Console, report: DataReport) -> None:
    from paceline.contracts import NONE
    from paceline.experiments.data_report import shares_by_drafter

    table = _table("predicted: the fastest drafter of each row, at its best length", "task")
    names = [NONE, *report.acceptance]
    for name in (*names, "over none"):
        table.add_column(name, justify="right")
    for task, oracle in report.oracle.items():
        _before_all(table, task)
        shares = shares_by_drafter(oracle)
        cells = [f"{shares[name]:.0%}" if name in shares else "" for name in names]
        table.add_row(task, *cells, f"{oracle.speedup:.2f}x")
    console.print(table)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, pad_edge=False, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def _before_all(table: Any, task: str) -> None:
    from paceline.experiments.data_report import ALL

    if task == ALL:
        table.add_section()
