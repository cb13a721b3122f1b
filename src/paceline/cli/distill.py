"""`paceline distill`: train a small drafter on the target's own answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import say

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.cli.progress import Report
    from paceline.config import Config
    from paceline.distillation.measures import Measures
    from paceline.distillation.train import TrainingProgress
    from paceline.terminal import BandedTable


def distill(
    data: Annotated[
        list[Path] | None,
        typer.Argument(help="JSONL or Parquet files with id, domain and prompt in each row."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the drafter to write.")] = None,
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    size: Annotated[
        str | None, typer.Option(help="small (1.4 M parameters for the bundled target) or medium.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="What to minimise; docs/distillation.md lists the losses.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the answers.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    threads: options.Threads = None,
    measure: Annotated[
        list[Path] | None,
        typer.Option(help="Also measure on the validation prompts of this file; may be repeated."),
    ] = None,
    setting: options.Assignments = None,
    suggest: Annotated[
        bool,
        typer.Option(
            "--suggest",
            help="Only measure student shapes on this machine and show the acceptance that each needs.",
        ),
    ] = False,
    from_log: Annotated[
        str | None,
        typer.Option(
            metavar="DRAFTER",
            help="Train this drafter further on served requests; adopt it if acceptance rises.",
        ),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Folder of the decision log, instead of log.folder.")
    ] = None,
) -> None:
    """Answer prompts with the target, then align a drafter with it. Resumes.

    Flags override the section `distillation` of the configuration.
    """
    from rich.console import Console

    from paceline.errors import ConfigError

    trained_by = {
        "files of prompts": data, "--out": out, "--from-log": from_log, "--size": size, "--loss": loss,
        "--epochs": epochs, "--seed": seed, "--measure": measure, "--set": setting,
    }  # fmt: skip
    if suggest and (
        given := [name for name, value in trained_by.items() if value not in (None, [])]
    ):
        raise ConfigError(f"--suggest trains nothing; remove it, or {', '.join(given)}")
    if log is not None and from_log is None:
        raise ConfigError("--log is read by --from-log; name a drafter with it, or remove --log")
    configured = options.configured(config, threads=threads)
    if suggest:
        _suggest(configured, Console())
        return
    if from_log is not None:
        from paceline.cli.improvement import improve

        if measure:
            raise ConfigError("--measure is of a new drafter; remove it or --from-log")
        flags: dict[str, object] = {"size": size, "loss": loss, "epochs": epochs, "seed": seed}
        flags |= {"threads": threads, **options.assigned(setting)}
        console = Console()
        improve(
            configured, from_log, log, out, data or [], flags, console,
            lambda report: _Follower(console, report),
        )  # fmt: skip
        return

    from paceline.cli.progress import progress
    from paceline.config import parse
    from paceline.distillation import DistillationSection
    from paceline.verbs.distillation import distill as run_distill

    flags = {"size": size, "loss": loss, "epochs": epochs, "seed": seed, "threads": threads}
    raw = configured.distillation | options.given(flags) | options.assigned(setting)
    section = parse(DistillationSection, raw, "distill")
    console = Console()
    with progress(console) as report:
        result = run_distill(
            configured.model_copy(update={"distillation": raw}),
            data or section.data,
            out or section.out,
            section.settings(),
            _Follower(console, report),
            measure or section.measure,
        )
    console.print(measures_table(result.measures, "validation prompts"))
    for note in result.notes:
        console.print(f"- {note}", highlight=False)
    say(console, f"written: {result.out}, {result.num_parameters / 1e6:.2f} M parameters")


class _Follower:
    """Draws the steps of a training as a bar, and prints a line per validation."""

    def __init__(self, console: Console, report: Report) -> None:
        self._console, self._report = console, report
        self._shown: tuple[str, int] | None = None

    def __call__(self, step: TrainingProgress) -> None:
        loss = "" if math.isnan(step.loss) else f"loss {step.loss:.3f}"
        self._report(step.phase, step.step, step.total, loss)
        figures = step.figures
        if figures is None or self._shown == (step.phase, figures["step"]):
            return
        self._shown = (step.phase, figures["step"])
        tau = figures["block_efficiency"].get("3", math.nan)
        self._console.print(
            f"{step.phase} {figures['step']:,}: loss {figures['train_loss']:.3f}, match "
            f"{figures['match_rate']:.3f}, tau {tau:.2f} at K=3, speed-up "
            f"{figures['predicted_speedup']:.2f}; {step.tokens_per_second:,.0f} tokens/s",
            highlight=False,
        )


def measures_table(measures: Measures, title: str) -> BandedTable:
    """Return a drafter's measures per task."""
    from paceline.terminal import BandedTable

    length = "3"
    table = BandedTable(title=title)
    for column in (
        "task",
        "answers",
        "match rate",
        "acceptance",
        "tau, K=3",
        "MBSU, K=3",
        "speed-up",
    ):
        table.add_column(column, justify="left" if column == "task" else "right")
    figures = measures.to_history()
    for task, own in measures.tasks.items():
        row = figures["domains"][task]
        accepted = row["acceptance"]
        table.add_row(
            task,
            str(own.num_answers),
            f"{own.match_rate:.3f}",
            "-" if accepted is None else f"{accepted:.3f}",
            *(_at(row[name], length) for name in ("block_efficiency", "mbsu")),
            f"{row['predicted_speedup']:.2f}",
        )
    return table


def _at(figures: dict[str, float], length: str) -> str:
    return f"{figures[length]:.2f}" if length in figures else "-"  # prices of shorter drafts


def _suggest(config: Config, console: Console) -> None:
    """Measure student shapes for the target and print them."""
    from paceline.cli.progress import progress
    from paceline.cli.suggestions import print_suggestions
    from paceline.verbs.distillation import suggest_shapes

    with progress(console) as report:
        found = suggest_shapes(config, report)
    print_suggestions(found, console)
