"""`paceline trigram build`: a tri-gram table of text, for drafters of kind `trigram_tree`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import ResumingVerb, say

trigram = typer.Typer(name="trigram", no_args_is_help=True)


@trigram.callback()
def root() -> None:
    """Build tables for drafters of kind trigram_tree."""


@trigram.command(cls=ResumingVerb)
def build(
    out: Annotated[Path, typer.Option(help="File of the table to write.")],
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="UTF-8 text file; more may follow.")
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE...", help="More text files.")
    ] = None,
    from_collection: Annotated[
        bool, typer.Option("--from-collection", help="Read the target's answers in the store.")
    ] = False,
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    store: options.Store = None,
    max_successors: Annotated[
        int, typer.Option(help="Maximum number of successors per pair.")
    ] = 12,
    min_count: Annotated[int, typer.Option(help="Drop tri-grams that occur less often.")] = 1,
    memory_mb: Annotated[int, typer.Option(help="Megabytes of memory for sorting.")] = 256,
) -> None:
    """Count the successors of each pair of tokens in text of any size. Resumes."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.config import parse
    from paceline.drafting.trigram.build import BuildSettings
    from paceline.verbs.trigrams import build_trigrams

    raw = {"max_successors": max_successors, "min_count": min_count, "memory_mb": memory_mb}
    settings = parse(BuildSettings, raw, "trigram build")
    console = Console()
    files = [*(text or ()), *(more or ())]
    with progress(console) as report:
        facts = build_trigrams(
            options.configured(config, store=store), out, files, from_collection, settings, report
        )
    say(
        console,
        f"{facts.num_tokens:,} tokens read; {facts.num_pairs:,} pairs with {facts.num_trigrams:,} "
        f"successors written: {out}, {out.stat().st_size / 1e6:.1f} MB",
    )
    say(console, "next: name it as the `table` of a drafter of kind trigram_tree")
