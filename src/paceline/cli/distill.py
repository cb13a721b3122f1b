"""`paceline distill`: train a small drafter on the target's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import say


def distill(
    data: Annotated[
        list[Path], typer.Argument(help="JSONL files with id, domain and prompt on each line.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the drafter to write.")],
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    size: Annotated[str, typer.Option(help="small (1.4 M parameters) or medium (4 M).")] = "small",
    epochs: Annotated[float | None, typer.Option(help="Passes over the answers.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    threads: options.Threads = None,
    measure: Annotated[
        list[Path] | None,
        typer.Option(help="Also measure on the validation prompts of this file; may be repeated."),
    ] = None,
    setting: options.Assignments = None,
) -> None:
    """Decode prompts with the target, then train a drafter to predict the answers. Resumes."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.config import parse
    from paceline.distillation import DistillSettings
    from paceline.distillation import distill as run_distill
    from paceline.distillation.train import TrainingProgress
    from paceline.terminal import BandedTable

    flags = {"size": size, "epochs": epochs, "seed": seed, "threads": threads}
    raw = options.given(flags) | options.assigned(setting)
    settings = parse(DistillSettings, raw, "distill")
    console = Console()
    with progress(console) as report:

        def on_progress(step: TrainingProgress) -> None:
            report(step.phase, step.step, step.total)

        result = run_distill(
            options.configured(config),
            data,
            out,
            settings,
            on_progress,
            also_measure=measure or (),
        )
    table = BandedTable(title="validation prompts")
    for column in ("task", "tokens", "match rate", "loss"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for domain, quality in result.quality.items():
        table.add_row(
            domain,
            str(quality.num_tokens),
            f"{quality.match_rate:.3f}",
            f"{quality.loss:.3f}",
        )
    console.print(table)
    say(console, f"written: {result.out}, {result.num_parameters / 1e6:.2f} M parameters")
