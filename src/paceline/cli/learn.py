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
    from_log: Annotated[
        bool, typer.Option("--from-log", help="Learn from what was served; see log.folder.")
    ] = False,
) -> None:
    """Train the policy with REINFORCE; no model runs here, but for replaying a log."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.config import LearningSection, parse
    from paceline.experiments.from_log import learn_from_log
    from paceline.experiments.pipeline import learn as run_learn
    from paceline.learning import LearningResult
    from paceline.learning.evaluation.tables import show_report

    settings = configured(config, store=store, costs=costs, policy=policy)
    flags = {"reward": reward, "alpha": alpha, "seed": seed}
    raw = settings.learning.model_dump() | {k: v for k, v in flags.items() if v is not None}
    section = parse(LearningSection, raw, "learning")
    settings = settings.model_copy(update={"learning": section})
    console = Console()
    notes: list[str] = []
    verdict = None
    with progress(console) as report:
        if from_log:
            learned, verdict, notes = learn_from_log(settings, report)
        else:
            learned = run_learn(settings, report)
    for note in notes:
        console.print(f"note: of the log, {note}", markup=False)
    if isinstance(learned, LearningResult):
        show_report(console, learned.report)
    else:
        low, high = learned.gain.interval()
        console.print(
            f"log tokens/s over what was served: {learned.gain.value:+.3f} (95%: {low:+.3f} to "
            f"{high:+.3f}), from choices alone, {learned.gain.effective_sample_size:.0f} of "
            f"{learned.gain.num_requests} held-out requests' worth"
        )
    if verdict is not None:
        console.print(f"against the policy in use: {verdict.reason}")
    kept = verdict is not None and not verdict.adopt
    console.print(f"{'kept' if kept else 'written'}: {settings.paths.policy}")
