"""`paceline doctor`: check a configuration and predict the gain of each drafter."""

from __future__ import annotations

import typer

from paceline.cli import options
from paceline.cli.next_steps import say


def doctor(
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Check a configuration before weights are read. Exit code 2 if a drafter cannot be used."""
    from rich.console import Console

    from paceline.bench.doctor import ModelFacts
    from paceline.bench.doctor import doctor as run_doctor
    from paceline.contracts import AUTO
    from paceline.terminal import PROSE, BandedTable

    def size(facts: ModelFacts | None) -> tuple[str, str, str]:
        if facts is None:
            return "-", "-", "-"
        packed = f"{facts.packed_bytes / 2**20:.1f} MiB packed + " if facts.packed_bytes else ""
        cache = f"{facts.cache_bytes_per_token / 1024:.1f} KiB/token"
        return (
            f"{facts.parameters / 1e6:.1f} M",
            facts.dtype,
            f"{facts.weight_bytes / 2**20:.1f} MiB + {packed}{cache}",
        )

    report = run_doctor(options.configured(config, dtype, device, threads))
    console = Console()
    table = BandedTable()
    for column in ("model", "kind", "parameters", "dtype"):
        table.add_column(column)
    for column in ("memory", "vocabulary", "predicted"):
        table.add_column(column, overflow=PROSE)
    vocabulary = f"{report.num_tokens} tokens"
    table.add_row("[bold]target[/]", report.device, *size(report.facts), vocabulary, "1.00x")
    for drafter in report.drafters:
        table.add_row(
            drafter.name,
            drafter.kind,
            *size(drafter.facts),
            drafter.vocabulary,
            drafter.predicted if drafter.problem is None else "[red]cannot be used[/]",
        )
    console.print(table)
    template = "has" if report.chat_template else "has no"
    say(
        console,
        f"target: {report.target}; context {report.facts.context}; {template} chat template",
    )
    for name, facts in report.facts_by_name().items():
        why = facts.why_not_compiled
        why = "" if why is None else f"; not compiled: {why}"
        say(console, f"forward of {name}: {facts.forward or 'not known'}{why}")
    for note in report.notes:
        say(console, f"note: {note}")
    for problem in report.problems:
        say(console, f"problem: {problem}", style="bold red")
    if report.problems:
        raise typer.Exit(2)
    say(console, "each named drafter can be used with this configuration")
    if report.why_no_policy is None:
        say(console, f"drafter '{AUTO}' is the policy's choice: it was learned for these drafters")
    else:
        say(
            console,
            f"drafter '{AUTO}' is a lookup, and none where that does not pay; no policy can be used: "
            f"{report.why_no_policy}",
        )
