"""`paceline pretrain`: train a small model from scratch on prompts with their references."""

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
    from paceline.distillation.train import TrainingProgress


def pretrain(
    data: Annotated[
        list[Path],
        typer.Argument(help="JSONL or Parquet files with id, domain, prompt and reference."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the model to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with the model's tokenizer.")],
    architecture: Annotated[
        str, typer.Option(help="t5, which reads prompts by an encoder, or llama.")
    ] = "t5",
    epochs: Annotated[float | None, typer.Option(help="Passes over the pairs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    threads: options.Threads = None,
    setting: options.Assignments = None,
) -> None:
    """Train a small model from scratch on prompts with their references. Resumes.

    It needs no target and can become one. The sizes are a setting: --set 'shape={"num_layers": 6,
    "num_encoder_layers": 4, "hidden_size": 256, "mlp_size": 768, "num_heads": 4}'.
    """
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.config import parse
    from paceline.distillation.pretrain_settings import PretrainSettings
    from paceline.distillation.pretraining import pretrain as run_pretrain

    flags = {"epochs": epochs, "seed": seed, "threads": threads}
    raw = {"tokenizer": tokenizer, "architecture": architecture}
    raw |= options.given(flags) | options.assigned(setting)
    settings = parse(PretrainSettings, raw, "pretrain")
    console = Console()
    with progress(console) as report:
        result = run_pretrain(data, out, settings, _Follower(console, report))
    for task, loss in result.losses.items():
        console.print(
            f"{task}: loss {loss:.3f} nats per token, match rate {result.match_rates[task]:.3f}",
            highlight=False,
        )
    for note in result.notes:
        console.print(f"- {note}", highlight=False)
    say(console, f"written: {result.out}, {result.num_parameters / 1e6:.2f} M parameters")


class _Follower:
    """Draws the steps of a training as a bar, and prints a line per validation."""

    def __init__(self, console: Console, report: Report) -> None:
        self._console, self._report = console, report
        self._shown: int | None = None

    def __call__(self, step: TrainingProgress) -> None:
        loss = "" if math.isnan(step.loss) else f"loss {step.loss:.3f}"
        self._report(step.phase, step.step, step.total, loss)
        figures = step.figures
        if figures is None or self._shown == figures["step"]:
            return
        self._shown = figures["step"]
        self._console.print(
            f"{step.phase} {figures['step']:,}: loss {figures['train_loss']:.3f}, on validation "
            f"prompts {figures['loss']:.3f}, match {figures['match_rate']:.3f}; "
            f"{step.tokens_per_second:,.0f} tokens/s",
            highlight=False,
        )
