"""`paceline learn`: train the policy from a collection and this machine's costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import DEFAULT_CONFIG, ConfigOption, configured


def learn(
    config: ConfigOption = DEFAULT_CONFIG,
    store: Annotated[Path | None, typer.Option(help="Folder of the collection.")] = None,
    costs: Annotated[Path | None, typer.Option(help="File of the cost table.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Folder of the policy to write.")] = None,
    reward: Annotated[str | None, typer.Option(help="speed or alignment.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Similarity's weight in alignment.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.")] = None,
) -> None:
    """Train the policy with REINFORCE; no model runs here."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.config import LearningSection, parse
    from paceline.experiments.pipeline import learn as run_learn
    from paceline.learning.evaluation.tables import show_report

    settings = configured(config, store=store, costs=costs, policy=policy)
    flags = {"reward": reward, "alpha": alpha, "seed": seed}
    raw = settings.learning.model_dump() | {k: v for k, v in flags.items() if v is not None}
    section = parse(LearningSection, raw, "learning")
    settings = settings.model_copy(update={"learning": section})
    console = Console()
    with progress(console) as report:
        learned = run_learn(settings, report)
    show_report(console, learned.report)
    console.print(f"written: {settings.paths.policy}")
