"""`paceline learn`: train the policy from a collection and this machine's costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.next_steps import say
from paceline.cli.options import DEFAULT_CONFIG, ConfigOption, configured

if TYPE_CHECKING:
    from paceline.learning import LearningResult


def learn(
    config: ConfigOption = DEFAULT_CONFIG,
    store: Annotated[Path | None, typer.Option(help="Folder of the collection.")] = None,
    costs: Annotated[Path | None, typer.Option(help="File of the cost table.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Folder of the policy to write.")] = None,
    learner: Annotated[
        str | None, typer.Option(help="acceptance, reinforce, policy_gradient, knn, linucb, ...")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="speed or alignment.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Similarity's weight in alignment.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Similarity in alignment: rouge_1, rouge_l, edit, prefix.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="latency, throughput, or a weight from 0 to 1 between.")
    ] = None,
    draft_lengths: Annotated[
        str | None, typer.Option(help="Draft lengths that are arms: 1,2,4; '' for none.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Train under so many seeds.")] = None,
    search: Annotated[
        int, typer.Option(min=0, help="Try so many settings first, by cross-validation.")
    ] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG of the learning curves.")] = None,
    from_log: Annotated[
        bool, typer.Option("--from-log", help="Learn from what was served; see log.folder.")
    ] = False,
) -> None:
    """Train the policy; no model runs here, but for replaying a log."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.config import LearningSection, parse
    from paceline.errors import ConfigError
    from paceline.learning import LearningResult
    from paceline.learning.evaluation.tables import show_report
    from paceline.verbs.from_log import learn_from_log
    from paceline.verbs.pipeline import learn as run_learn

    settings = configured(config, store=store, costs=costs, policy=policy)
    flags: dict[str, Any] = {
        "learner": learner,
        "reward": reward,
        "alpha": alpha,
        "metric": metric,
        "objective": _number_or_name(objective),
        "draft_lengths": _lengths(draft_lengths),
        "seed": seed,
        "seeds": seeds,
    }
    raw = settings.learning.model_dump() | {k: v for k, v in flags.items() if v is not None}
    section = parse(LearningSection, raw, "learning")
    settings = settings.model_copy(update={"learning": section})
    if from_log and (search or plot is not None):
        raise ConfigError("--search and --plot are of a collection; leave them out with --from-log")
    console = Console()
    notes: list[str] = []
    verdict = None
    with progress(console) as report:
        if from_log:
            learned, verdict, notes = learn_from_log(settings, report)
        else:
            learned = run_learn(settings, report, search, plot)
    for note in notes:
        say(console, f"note: of the log, {note}")
    if isinstance(learned, LearningResult):
        show_report(console, learned.report)
        for line in _facts(learned):
            say(console, line)
    else:
        low, high = learned.gain.interval()
        say(
            console,
            f"log tokens/s over what was served: {learned.gain.value:+.3f} (95%: {low:+.3f} to "
            f"{high:+.3f}), from choices alone, {learned.gain.effective_sample_size:.0f} of "
            f"{learned.gain.num_requests} held-out requests' worth",
        )
    if verdict is not None:
        say(console, f"against the policy in use: {verdict.reason}")
    kept = verdict is not None and not verdict.adopt
    say(console, f"{'kept' if kept else 'written'}: {settings.paths.policy}")
    if plot is not None and not from_log:
        say(console, f"written: {plot}")


def _number_or_name(objective: str | None) -> float | str | None:
    try:
        return None if objective is None else float(objective)
    except ValueError:
        return objective


def _lengths(text: str | None) -> list[str] | None:
    """As the schema takes them, which says what is wrong with one that is no number."""
    return None if text is None else [part for part in text.split(",") if part.strip()]


def _facts(learned: LearningResult) -> list[str]:
    """What was found on the way, a line each."""
    lines = []
    found = learned.training.settings
    if found:
        lines.append("found: " + ", ".join(f"{name} {value:g}" for name, value in found.items()))
    if len(learned.seeds.scores) > 1:
        seeds = learned.seeds
        kept = "their average is kept" if seeds.kept == "average" else "the best is kept"
        lines.append(
            f"{len(seeds.scores)} seeds: cross-validated reward {seeds.mean:.4f}, spread "
            f"{seeds.spread:.4f}; {kept}"
        )
    return lines
