"""`paceline drafters`: the kinds of drafters, the configured arms and their memory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import say

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.bench.drafters import DrafterKind, DrafterList


def drafters(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="YAML file whose arms to list. Default: paceline.yaml, if it exists.",
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Load the models and show the memory of each arm.")
    ] = False,
    as_json: options.AsJson = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """List every kind of drafter and the configured arms. Exit code 2 if one cannot be used."""
    from rich.console import Console

    from paceline.bench.drafters import drafters as list_drafters
    from paceline.errors import ConfigError

    path = config or (options.DEFAULT_CONFIG if options.DEFAULT_CONFIG.exists() else None)
    if path is None and memory:
        raise ConfigError("--memory needs a configuration; name one with --config")
    settings = options.configured(path, dtype, device, threads) if path is not None else None
    found = list_drafters(settings, memory)
    console = Console()
    if as_json:
        console.print_json(json.dumps(asdict(found)))
    else:
        _print(console, found)
    if found.problems:
        raise typer.Exit(2)


def _print(console: Console, found: DrafterList) -> None:
    from paceline.terminal import PROSE, BandedTable

    table = BandedTable()
    table.add_column("kind")
    for column in ("description", "needs", "arms"):
        table.add_column(column, overflow=PROSE)
    for kind in found.kinds:
        table.add_row(kind.kind, kind.summary, ", ".join(kind.needs) or "-", _arms(kind))
    console.print(table)
    if found.row_tokens is not None:
        _print_memory(console, found)
    elif found.target is None:
        say(console, "no configuration: name one with --config to see its arms")
    for problem in found.problems:
        say(console, f"problem: {problem}", style="bold red")


def _arms(kind: DrafterKind) -> str:
    """Return the arms of a kind, or the settings that an arm needs."""
    if kind.arms:
        return ", ".join(arm.name + (" [red](!)[/]" if arm.problem else "") for arm in kind.arms)
    return f"[dim]settings: {', '.join(kind.required)}[/]" if kind.required else "[dim]ready[/]"


def _print_memory(console: Console, found: DrafterList) -> None:
    from paceline.terminal import BandedTable

    table = BandedTable()
    table.add_column("arm")
    table.add_column("held when loaded", justify="right")
    table.add_column(f"a row of {found.row_tokens} tokens adds", justify="right")
    for arm in (arm for kind in found.kinds for arm in kind.arms):
        if arm.weight_bytes is not None and arm.row_bytes is not None:
            table.add_row(arm.name, _size(arm.weight_bytes), _size(arm.row_bytes))
    console.print(table)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB" if num_bytes else "-"
