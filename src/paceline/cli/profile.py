"""`paceline profile`: measure this machine's cost table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import (
    DEFAULT_CONFIG,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ExactOption,
    ThreadsOption,
    configured,
)


def profile(
    config: ConfigOption = DEFAULT_CONFIG,
    costs: Annotated[Path | None, typer.Option(help="File of the cost table.")] = None,
    dtype: DtypeOption = None,
    exact: ExactOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Time the target's and every drafter's real forwards on this machine."""
    from rich.console import Console
    from rich.table import Table

    from paceline.cli.progress import progress
    from paceline.experiments.pipeline import profile as run_profile

    settings = configured(config, dtype, device, threads, exact, costs=costs)
    console = Console()
    with progress(console) as report:
        table = run_profile(settings, report)
    step = table.seconds("target", "forward", 1, context=128)
    shown = Table(title="milliseconds at context 128", pad_edge=False)
    for column in ("what", "1 token", "5 tokens", "5 tokens over 1 target token"):
        shown.add_column(column, justify="right" if column != "what" else "left")
    lines = [("target forward", "target", "forward")]
    lines += [(f"{name} propose", name, "propose") for name in settings.drafters]
    for label, subject, operation in lines:
        one = table.seconds(subject, operation, 1, context=128)
        five = table.seconds(subject, operation, 5, context=128)
        shown.add_row(label, f"{one * 1e3:.2f}", f"{five * 1e3:.2f}", f"{five / step:.2f}")
    console.print(shown)
    console.print(f"written: {settings.paths.costs}")
