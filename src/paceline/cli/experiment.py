"""`paceline experiment`: a published claim or a question of our own, answered by one command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import say

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.experiments.findings import Table
    from paceline.experiments.recipes import DryRun


def experiment(
    name: Annotated[str | None, typer.Argument(help="Name of the experiment; see --list.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the experiments.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results. Default: docs/experiments/assistant-selection, for "
            "direct-alignment docs/experiments/direct-alignment."
        ),
    ] = None,
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    data: Annotated[
        Path | None,
        typer.Option(envvar="PACELINE_DATA", help="Folder of prompt files, if not the demo's."),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts per task to collect and learn from.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes in other folders: shows that it works.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Working folder of all experiments. Default: runs/experiments."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="An existing collection to use instead of the working folder's."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Size of direct-alignment: small (default) or full.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of direct-alignment that train at the same time."),
    ] = None,
    collect_docs: Annotated[
        bool,
        typer.Option("--collect-docs", help="Write the results into their page again."),
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe at the papers' own scale to run instead.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check a recipe's shapes, memory and time without weights."),
    ] = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Run an experiment and write a table, a figure and JSON. Resumes what it collects."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.errors import ConfigError
    from paceline.experiments.catalog import experiment as run_experiment
    from paceline.experiments.catalog import find_experiment

    console = Console()
    if list_all:
        _print_list(console)
        return
    if collect_docs:
        say(console, f"written: {_collect_docs(name, out, budget)}")
        return
    if recipe is not None:
        if name is not None or any(
            (out, prompts, smoke, store, budget, workers, dtype, device, threads)
        ):
            raise ConfigError(
                "a recipe defines its own run; with --recipe, give no other flag than --dry-run, --data "
                "and --folder"
            )
        _run_recipe(console, recipe, dry_run, data, folder)
        return
    if name is None or dry_run:
        missing = "--recipe" if dry_run else "name"
        raise ConfigError(
            f"{missing} is missing; `paceline experiment --list` shows the experiments, "
            "experiments/recipes/ has recipes"
        )
    find_experiment(name)
    overridden = any(value is not None for value in (dtype, device, threads))
    chosen = options.configured(config, dtype, device, threads) if overridden else config
    with progress(console) as report:
        done = run_experiment(
            name, out, chosen, data, prompts, smoke, folder, report, store, budget, workers
        )
    _print_table(console, done.findings.tables[0])
    for remark in done.findings.remarks:
        console.print(f"- {remark}", markup=False, highlight=False)
    say(console, f"written: {', '.join(map(str, done.files))}")


def _collect_docs(name: str | None, out: Path | None, budget: str | None) -> Path:
    """Write the page of an experiment, or of those on choosing the assistant, from their results."""
    from paceline.experiments import page
    from paceline.experiments.catalog import ALIGNMENT, ALIGNMENT_OUT, OUT, find_experiment

    if name is not None and find_experiment(name) is ALIGNMENT:
        return page.collect_alignment(out or ALIGNMENT_OUT, budget or "small")
    return page.collect_docs(out or OUT)


def _print_list(console: Console) -> None:
    from paceline.experiments.catalog import QUESTIONS
    from paceline.terminal import PROSE, BandedTable

    shown = BandedTable()
    shown.add_column("name")
    for head in ("question", "the paper's claim"):
        shown.add_column(head, overflow=PROSE)
    for found in QUESTIONS.values():
        shown.add_row(found.name, found.title, str(found.claim or "none; the question is our own"))
    console.print(shown)


def _print_table(console: Console, table: Table) -> None:
    from paceline.terminal import BandedTable

    shown = BandedTable(title=table.title)
    for column in table.columns:
        shown.add_column(column.name)
    for row in table.texts():
        shown.add_row(*row)
    console.print(shown)


def _run_recipe(
    console: Console, path: Path, dry: bool, data: Path | None, folder: Path | None
) -> None:
    from paceline.cli.progress import progress
    from paceline.experiments.catalog import FOLDER
    from paceline.experiments.recipes import dry_run, load_recipe, run_recipe
    from paceline.learning.evaluation.tables import show

    recipe = load_recipe(path)
    planned = dry_run(recipe)
    _print_plan(console, planned)
    if dry:
        return
    with progress(console) as report:
        found = run_recipe(recipe, folder or FOLDER / path.stem, data, report)
    show(console, found)


def _print_plan(console: Console, planned: DryRun) -> None:
    from paceline.terminal import BandedTable

    recipe, device = planned.recipe, planned.recipe.device
    write = partial(console.print, markup=False, highlight=False)
    write(f"{recipe.title} ({recipe.paper})")
    for claim in recipe.claims:
        write(f"the paper: {claim}")
    for line in recipe.ours:
        write(f"our choice: {line}")
    shown = BandedTable()
    heads = ("", "kind", "parameters", "weights, GB", "cache, GB", "table, GB", "K", "ms per step")
    for head in (*heads, "pays above, tokens per round"):
        shown.add_column(head, justify="left" if head in ("", "kind") else "right")
    for plan in planned.models:
        sizes = (plan.weight_bytes, plan.cache_bytes, plan.host_bytes)
        shown.add_row(
            *(plan.name, plan.kind, f"{plan.parameters / 1e6:,.0f} M" if plan.parameters else ""),
            *(f"{size / 1e9:.2f}" if size else "" for size in sizes),
            *(
                str(plan.draft_length or ""),
                f"{1e3 * plan.step_seconds:.2f}" if plan.step_seconds else "",
            ),
            f"{plan.break_even:.2f}" if plan.draft_length else "",
        )
    console.print(shown)
    used = planned.needed_bytes / planned.device_bytes
    write(
        f"memory: {planned.needed_bytes / 1e9:.1f} GB of {planned.device_bytes / 1e9:.0f} on "
        f"{device.count} x {device.name} ({used:.0%}), rows: {recipe.rows}"
    )
    write(
        f"predicted, not measured, by a roofline at {device.efficiency:.0%} of {device.count} x "
        f"({device.gigabytes_per_second:,.0f} GB/s, {device.teraflops:,.0f} TFLOPS); "
        f"{recipe.workload.prompts} prompts of {recipe.workload.prompt_tokens} and answers of "
        f"{recipe.workload.new_tokens} tokens:"
    )
    for stage, seconds in planned.seconds.items():
        write(f"  {stage}: {_duration(seconds)}")
    for note in planned.notes:
        write(f"note: {note}")


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
