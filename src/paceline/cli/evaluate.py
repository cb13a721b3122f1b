"""`paceline evaluate`: policies against every other way to choose, by replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.next_steps import say
from paceline.cli.options import DEFAULT_CONFIG, ConfigOption, configured

if TYPE_CHECKING:
    from paceline.config import Config


def evaluate(
    config: ConfigOption = DEFAULT_CONFIG,
    store: Annotated[Path | None, typer.Option(help="Folder of the collection.")] = None,
    costs: Annotated[Path | None, typer.Option(help="File of the cost table.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Folder of the policy.")] = None,
    compare: Annotated[
        str, typer.Option(help="Learners, with commas: trained here and compared.")
    ] = "",
    encoders: Annotated[
        str,
        typer.Option(help="What those see: a,b;a;none is both, the first alone, and no features."),
    ] = "",
    seeds: Annotated[int, typer.Option(help="How often each of those is trained.")] = 1,
    rows: Annotated[str, typer.Option(help="Requests in flight, with commas.")] = "1",
    objective: Annotated[
        str | None, typer.Option(help="latency, throughput, or a weight from 0 to 1 between.")
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of another collection to test on; may be repeated."),
    ] = None,
    leave_one_task_out: Annotated[
        bool, typer.Option("--leave-one-task-out", help="Also test each task without its prompts.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Predict, on prompts never trained on, what each drafter, the policy and the oracle would gain."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.experiments.evaluation import evaluate as run_evaluate
    from paceline.learning.evaluation import parse_encoders
    from paceline.learning.evaluation.plot import plot as draw
    from paceline.learning.evaluation.tables import show
    from paceline.plotting import import_figure

    if plot is not None:
        import_figure()  # before the work is done rather than after

    settings = _towards(configured(config, store=store, costs=costs, policy=policy), objective)
    loads = _numbers(rows)
    console = Console()
    with progress(Console(stderr=True)) as report:
        found = run_evaluate(
            settings,
            compare=[name.strip() for name in compare.split(",") if name.strip()],
            encoders=parse_encoders(encoders) if encoders else [None],
            seeds=seeds,
            loads=loads,
            on=_folders(on or []),
            leave_one_task_out=leave_one_task_out,
            on_progress=report,
        )
    if plot is not None:
        draw(found, plot)
    if as_json:
        console.print_json(found.to_json())
        return
    show(console, found)
    if plot is not None:
        say(console, f"written: {plot}")


def _towards(settings: Config, objective: str | None) -> Config:
    """The configuration with another objective."""
    from paceline.config import LearningSection, parse

    if objective is None:
        return settings
    try:
        wanted: str | float = float(objective)
    except ValueError:
        wanted = objective
    raw = settings.learning.model_dump() | {"objective": wanted}
    section = parse(LearningSection, raw, "learning")
    return settings.model_copy(update={"learning": section})


def _numbers(text: str) -> list[int]:
    from paceline.errors import ConfigError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--rows '{text}': give whole numbers from 1, with commas: 1,4,16")
    return numbers


def _folders(named: list[str]) -> dict[str, Path]:
    from paceline.errors import ConfigError

    folders = {}
    for text in named:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise ConfigError(f"--on '{text}': give NAME=FOLDER")
        folders[name] = Path(folder)
    return folders
