"""`paceline evaluate`: the policy against every other way to choose, by replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import DEFAULT_CONFIG, ConfigOption, configured

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.learning import EvaluationReport


def evaluate(
    config: ConfigOption = DEFAULT_CONFIG,
    store: Annotated[Path | None, typer.Option(help="Folder of the collection.")] = None,
    costs: Annotated[Path | None, typer.Option(help="File of the cost table.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Folder of the policy.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Predict, on held-out prompts, what each drafter, the policy and the oracle would gain."""
    from rich.console import Console

    from paceline.experiments.pipeline import evaluate as run_evaluate

    report = run_evaluate(configured(config, store=store, costs=costs, policy=policy))
    console = Console()
    if as_json:
        console.print_json(report.to_json())
    else:
        print_evaluation(console, report)


def print_evaluation(console: Console, report: EvaluationReport) -> None:
    """A row for every domain, a column for every way to choose: predicted speed-up over none."""
    from rich.table import Table

    from paceline.contracts import NONE
    from paceline.learning.evaluate import POLICY

    parts = {**report.by_domain, "all": report.overall}
    arms = [arm for arm in report.overall.arms if arm != NONE]
    strategies = list(report.overall.strategies)
    table = Table(title="predicted speed-up over none, held-out prompts", pad_edge=False)
    table.add_column("task")
    table.add_column("prompts", justify="right")
    for name in (*arms, *strategies):
        table.add_column(name, justify="right", style="bold green" if name == POLICY else "")
    for domain, part in parts.items():
        if domain == "all":
            table.add_section()
        speedups = [part.arms[arm].speedup for arm in arms]
        speedups += [part.strategies[name].speedup for name in strategies]
        table.add_row(domain, str(part.num_prompts), *(f"{s:.2f}" for s in speedups))
    console.print(table)
    for name, interval in report.policy_over.items():
        console.print(
            f"policy over {name}: {interval.ratio:.3f} (95%: {interval.low:.3f} to "
            f"{interval.high:.3f})"
        )
    console.print(f"policy reaches {report.fraction_of_oracle:.1%} of the per-request oracle")
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
