"""`paceline collect`: the target's answers, and every drafter replayed on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import say

SHOWN = 5  # number of broken rows that are shown
if TYPE_CHECKING:
    from rich.console import Console

    from paceline.collection import CollectionReport
    from paceline.contracts import SamplingParams


def collect(
    prompts: Annotated[
        list[str],
        typer.Argument(help="JSONL or Parquet files, or saved datasets as FOLDER or FOLDER:SPLIT."),
    ],
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    store: options.Store = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 256,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts to take, by hash of id.")
    ] = None,
    part: options.Part = "all",
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="Temperature of the answers, 0 is greedy; may be repeated."),
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Keep the nucleus of this mass, at temperatures above 0.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0,
    alignment: Annotated[
        bool,
        typer.Option("--alignment", help="Also decode each drafter alone, for reward alignment."),
    ] = False,
    prompt_field: Annotated[str, typer.Option(help="Field of the prompt.")] = "prompt",
    id_field: Annotated[str, typer.Option(help="Field of the id; without one, a hash.")] = "id",
    domain_field: Annotated[str, typer.Option(help="Field of the task, for tables.")] = "domain",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out broken rows.")] = False,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="JSONL of outputs of other models, for the alignment reward."
        ),
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Also compare distributions: one more pass per prompt.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Number of processes; they share the threads.")] = 1,
    dtype: options.Dtype = None,
    exact: options.Exact = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Decode prompts once with the target and replay every drafter on the answers. Resumes."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.store import PromptFields, read_prompts, take_by_hash
    from paceline.verbs.pipeline import collect as run_collect

    settings = options.configured(config, dtype, device, threads, exact, store=store)
    fields = PromptFields(prompt_field, id_field, domain_field)
    bad: list[str] = []
    filters = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    samplings = _samplings(temperature or [0.0], filters, seed)
    written = options.named("--outputs", outputs, "NAME=FILE")
    found = read_prompts(prompts, fields, bad.append if skip_bad else None)
    records = take_by_hash(options.taken_part(found, part), limit)
    console = Console()
    if bad:
        say(console, f"{len(bad)} broken rows were left out; the first of them:")
        say(console, "\n".join(bad[:SHOWN]))
    with progress(console) as report:
        result = run_collect(
            settings,
            records,
            max_new_tokens,
            alignment,
            report,
            samplings=samplings,
            scores=scores,
            outputs={name: Path(file) for name, file in written.items()},
            sources=prompts,
            workers=workers,
        )
    say(console, f"{result.num_prompts} prompts in {settings.paths.store}")
    if result.too_long:
        say(console, f"{len(result.too_long)} prompts do not fit the context and were left out")
    _print_seconds(console, result)
    if written and not settings.drafters:
        say(console, "next: `paceline learn --reward alignment --learner reinforce`")
    else:
        say(console, "next: `paceline profile`, then `paceline learn`")


def _samplings(
    temperatures: list[float], filters: dict[str, float], seed: int
) -> list[SamplingParams]:
    """Return a sampling per temperature; the filters hold for sampled answers."""
    from paceline.contracts import GREEDY, SamplingParams
    from paceline.errors import ConfigError

    if not any(temperatures) and filters != {"top_p": 1, "top_k": 0, "min_p": 0}:
        raise ConfigError("--top-p, --top-k and --min-p need a --temperature above 0")
    return [
        SamplingParams(t, seed=seed, method="invariant", **filters)  # type: ignore[arg-type]
        if t
        else GREEDY
        for t in temperatures
    ]


def _print_seconds(console: Console, result: CollectionReport) -> None:
    """Print the seconds by stage, relative to decoding if this run decoded all that it replayed."""
    decode = result.seconds.get("decode", 0.0)
    fresh = result.num_decoded == result.num_prompts and decode > 0
    for stage, spent in result.seconds.items():
        share = f" ({spent / decode:.1%} of decoding)" if fresh and stage != "decode" else ""
        if spent > 0:
            console.print(f"{stage}: {spent:.1f} s{share}", highlight=False)
