"""`paceline learn`: train the policy from a collection and this machine's costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import say

if TYPE_CHECKING:
    from paceline.learning import LearningResult, TextsResult


def learn(
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    store: options.Store = None,
    costs: options.Costs = None,
    policy: options.Policy = None,
    learner: Annotated[
        str | None, typer.Option(help="acceptance, reinforce, policy_gradient, knn, linucb, ...")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="speed or alignment.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of the similarity in alignment.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Similarity in alignment: rouge_1, rouge_l, edit, prefix.")
    ] = None,
    objective: options.Objective = None,
    draft_lengths: Annotated[
        str | None, typer.Option(help="Draft lengths that are arms: 1,2,4; '' for none.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds to train with.")] = None,
    search: Annotated[
        int, typer.Option(min=0, help="Number of settings to try first, by cross-validation.")
    ] = 0,
    plot: options.Plot = None,
    from_log: Annotated[
        bool, typer.Option("--from-log", help="Learn from served requests; see log.folder.")
    ] = False,
) -> None:
    """Train the policy. Models run only to replay a log."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.errors import ConfigError
    from paceline.learning import ChoicesResult, LearningResult, TextsResult
    from paceline.learning.evaluation.tables import show_report
    from paceline.learning.text_report import show_texts
    from paceline.verbs.from_log import learn_from_log
    from paceline.verbs.pipeline import learn as run_learn

    lengths = None  # the schema checks the numbers
    if draft_lengths is not None:
        lengths = [part for part in draft_lengths.split(",") if part.strip()]
    settings = options.learning_with(
        options.configured(config, store=store, costs=costs, policy=policy),
        learner=learner,
        reward=reward,
        alpha=alpha,
        metric=metric,
        objective=objective,
        draft_lengths=lengths,
        seed=seed,
        seeds=seeds,
    )
    if from_log and (search or plot is not None):
        raise ConfigError("--search and --plot need a collection; remove them or --from-log")
    console = Console()
    notes: list[str] = []
    verdict = None
    learned: LearningResult | TextsResult | ChoicesResult
    with progress(console) as report:
        if from_log:
            learned, verdict, notes = learn_from_log(settings, report)
        else:
            learned = run_learn(settings, report, search, plot)
    for note in notes:
        say(console, f"note: of the log, {note}")
    if isinstance(learned, LearningResult):
        show_report(console, learned.report)
    if isinstance(learned, TextsResult):
        show_texts(console, learned.report)
    if not isinstance(learned, ChoicesResult):
        for line in _facts(learned):
            say(console, line)
    else:
        low, high = learned.gain.interval()
        say(
            console,
            f"gain in log tokens/s over the served choices: {learned.gain.value:+.3f} "
            f"(95%: {low:+.3f} to {high:+.3f}), from choices alone; effective sample size "
            f"{learned.gain.effective_sample_size:.0f} of {learned.gain.num_requests} held-out requests",
        )
    if verdict is not None:
        say(console, f"against the policy in use: {verdict.reason}")
    kept = verdict is not None and not verdict.adopt
    say(console, f"{'kept' if kept else 'written'}: {settings.paths.policy}")
    if isinstance(learned, TextsResult):
        say(console, "next: `paceline route PROMPT`")
    if plot is not None and not from_log:
        say(console, f"written: {plot}")


def _facts(learned: LearningResult | TextsResult) -> list[str]:
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
