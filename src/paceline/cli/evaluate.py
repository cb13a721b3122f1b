"""`paceline evaluate`: policies and other ways to choose, compared by replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import say


def evaluate(
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    store: options.Store = None,
    costs: options.Costs = None,
    policy: options.Policy = None,
    compare: Annotated[
        str, typer.Option(help="Learners to train here and to compare, separated by commas.")
    ] = "",
    encoders: Annotated[
        str,
        typer.Option(
            help="Features of those learners: a,b;a;none is both, the first alone, and none."
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(help="Number of trainings of each of those learners.")] = 1,
    rows: Annotated[
        str, typer.Option(help="Numbers of requests in flight, separated by commas.")
    ] = "1",
    objective: options.Objective = None,
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Another collection to test on; may be repeated."),
    ] = None,
    leave_one_task_out: Annotated[
        bool,
        typer.Option("--leave-one-task-out", help="Also train without each task and test on it."),
    ] = False,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Predict the gains of drafters, policies and the oracle on prompts that were not trained on."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.errors import ConfigError
    from paceline.learning.evaluation import parse_encoders
    from paceline.learning.evaluation.plot import plot as draw
    from paceline.learning.evaluation.tables import show
    from paceline.learning.text_report import TextReport, show_texts
    from paceline.plotting import import_figure
    from paceline.verbs.evaluate import evaluate as run_evaluate
    from paceline.verbs.texts import evaluates_texts

    if plot is not None:
        import_figure()  # fails before the work is done

    settings = options.configured(config, store=store, costs=costs, policy=policy)
    settings = options.learning_with(settings, objective=objective)
    loads = _numbers(rows)
    learners = [name.strip() for name in compare.split(",") if name.strip()]
    if plot is not None and evaluates_texts(settings, learners):
        raise ConfigError("the plot shows speeds, which texts do not have; remove --plot")
    folders = options.named("--on", on, "NAME=FOLDER")
    console = Console()
    with progress(Console(stderr=True)) as report:
        found = run_evaluate(
            settings,
            compare=learners,
            encoders=parse_encoders(encoders) if encoders else [None],
            seeds=seeds,
            loads=loads,
            on={name: Path(folder) for name, folder in folders.items()},
            leave_one_task_out=leave_one_task_out,
            on_progress=report,
        )
    if plot is not None and not isinstance(found, TextReport):
        draw(found, plot)
    if as_json:
        console.print_json(found.to_json())
        return
    if isinstance(found, TextReport):
        show_texts(console, found)
        return
    show(console, found)
    if plot is not None:
        say(console, f"written: {plot}")


def _numbers(text: str) -> list[int]:
    from paceline.errors import ConfigError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(
            f"--rows '{text}': give whole numbers from 1, separated by commas: 1,4,16"
        )
    return numbers
