"""`paceline collect`: what every drafter would have had accepted on the target's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import (
    DEFAULT_CONFIG,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ExactOption,
    ThreadsOption,
    configured,
)

SHOWN = 5  # broken rows named


def collect(
    prompts: Annotated[
        list[str],
        typer.Argument(help="JSONL or Parquet files, or saved datasets as FOLDER or FOLDER:SPLIT."),
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    store: Annotated[Path | None, typer.Option(help="Folder of the collection.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens an answer.")] = 256,
    limit: Annotated[
        int | None, typer.Option(help="Take this many prompts, by hash of id.")
    ] = None,
    alignment: Annotated[
        bool, typer.Option("--alignment", help="Also decode each drafter alone, for that reward.")
    ] = False,
    prompt_field: Annotated[str, typer.Option(help="Field of the prompt.")] = "prompt",
    id_field: Annotated[str, typer.Option(help="Field of its id; a hash without one.")] = "id",
    domain_field: Annotated[str, typer.Option(help="Field of its task, for tables.")] = "domain",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out broken rows.")] = False,
    dtype: DtypeOption = None,
    exact: ExactOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Decode prompts once with the target and replay every drafter on the answers. Resumes."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.experiments.pipeline import collect as run_collect
    from paceline.store import PromptFields, read_prompts, take_by_hash

    settings = configured(config, dtype, device, threads, exact, store=store)
    fields = PromptFields(prompt_field, id_field, domain_field)
    bad: list[str] = []
    records = read_prompts(prompts, fields, bad.append if skip_bad else None)
    records = take_by_hash(records, limit)
    console = Console()
    if bad:
        console.print(f"{len(bad)} broken rows were left out, the first of them:")
        console.print("\n".join(bad[:SHOWN]), markup=False, highlight=False)
    with progress(console) as report:
        result = run_collect(settings, records, max_new_tokens, alignment, report)
    console.print(f"{result.num_prompts} prompts in {settings.paths.store}")
    if result.num_too_long:
        console.print(f"{result.num_too_long} prompts did not fit the context and were left out")
    console.print("next: paceline profile, then paceline learn")
