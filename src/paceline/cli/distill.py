"""`paceline distill`: train a small drafter on the target's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.next_steps import say
from paceline.cli.options import DEFAULT_CONFIG, ConfigOption, configured


def distill(
    data: Annotated[
        list[Path], typer.Argument(help="JSONL files with id, domain and prompt on each line.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the drafter to write.")],
    config: ConfigOption = DEFAULT_CONFIG,
    size: Annotated[str, typer.Option(help="small (1.4 M parameters) or medium (4 M).")] = "small",
    epochs: Annotated[float | None, typer.Option(help="Passes over the answers.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    measure: Annotated[
        list[Path] | None, typer.Option(help="Measure on this file's validation prompts too.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting: --set learning_rate=0.002, repeatable."),
    ] = None,
) -> None:
    """Decode prompts with the target, then train a drafter to predict the answers. Resumes."""
    import yaml
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.config import parse
    from paceline.distillation import DistillSettings
    from paceline.distillation import distill as run_distill
    from paceline.distillation.train import TrainingProgress
    from paceline.errors import ConfigError
    from paceline.terminal import BandedTable

    raw: dict[str, Any] = {"size": size}
    flags = {"epochs": epochs, "seed": seed, "threads": threads}
    raw |= {key: value for key, value in flags.items() if value is not None}
    for assignment in setting or []:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got '{assignment}'")
        raw[key] = yaml.safe_load(value)
    settings = parse(DistillSettings, raw, "distill")
    console = Console()
    with progress(console) as report:

        def on_progress(step: TrainingProgress) -> None:
            report(step.phase, step.step, step.total)

        result = run_distill(
            # only the target takes part, so the drafters of the configuration need not exist yet
            configured(config).model_copy(update={"drafters": {}}),
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
