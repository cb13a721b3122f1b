"""`paceline collect`: what every drafter would have had accepted on the target's answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.next_steps import say
from paceline.cli.options import (
    DEFAULT_CONFIG,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ExactOption,
    ThreadsOption,
    configured,
)

SHOWN = 5  # broken rows named
if TYPE_CHECKING:
    from rich.console import Console

    from paceline.collection import CollectionReport
    from paceline.contracts import SamplingParams


def collect(
    prompts: Annotated[
        list[str],
        typer.Argument(help="JSONL or Parquet files, or saved datasets as FOLDER or FOLDER:SPLIT."),
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    store: Annotated[Path | None, typer.Option(help="Folder of the collection.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens an answer.")] = 256,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take this many prompts, by hash of id.")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            help="Answer each prompt at this temperature; repeat for several. 0 is greedy."
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus, for temperatures above 0.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The k likeliest tokens, likewise; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Floor against the likeliest, likewise.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of answers drawn at random.")] = 0,
    alignment: Annotated[
        bool, typer.Option("--alignment", help="Also decode each drafter alone, for that reward.")
    ] = False,
    prompt_field: Annotated[str, typer.Option(help="Field of the prompt.")] = "prompt",
    id_field: Annotated[str, typer.Option(help="Field of its id; a hash without one.")] = "id",
    domain_field: Annotated[str, typer.Option(help="Field of its task, for tables.")] = "domain",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out broken rows.")] = False,
    outputs: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="JSONL of outputs made elsewhere, for that reward."),
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Also compare distributions: one more pass a prompt.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that share the threads.")] = 1,
    dtype: DtypeOption = None,
    exact: ExactOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Decode prompts once with the target and replay every drafter on the answers. Resumes."""
    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.store import PromptFields, read_prompts, take_by_hash
    from paceline.verbs.pipeline import collect as run_collect

    settings = configured(config, dtype, device, threads, exact, store=store)
    fields = PromptFields(prompt_field, id_field, domain_field)
    bad: list[str] = []
    filters = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    samplings = _samplings(temperature or [0.0], filters, seed)
    written = _named_files(outputs or [])
    records = take_by_hash(read_prompts(prompts, fields, bad.append if skip_bad else None), limit)
    console = Console()
    if bad:
        say(console, f"{len(bad)} broken rows were left out, the first of them:")
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
            outputs=written,
            sources=prompts,
            workers=workers,
        )
    say(console, f"{result.num_prompts} prompts in {settings.paths.store}")
    if result.num_too_long:
        say(console, f"{result.num_too_long} prompts did not fit the context and were left out")
    _print_seconds(console, result)
    say(console, "next: `paceline profile`, then `paceline learn`")


def _samplings(
    temperatures: list[float], filters: dict[str, float], seed: int
) -> list[SamplingParams]:
    """The filters are of sampled answers; greedy ones have none."""
    from paceline.contracts import GREEDY, SamplingParams
    from paceline.errors import ConfigError

    if not any(temperatures) and (filters["top_p"], filters["top_k"], filters["min_p"]) != (
        1,
        0,
        0,
    ):
        raise ConfigError("--top-p, --top-k and --min-p need a --temperature above 0")
    return [
        SamplingParams(t, seed=seed, method="invariant", **filters)  # type: ignore[arg-type]
        if t
        else GREEDY
        for t in temperatures
    ]


def _named_files(given: list[str]) -> dict[str, Path]:
    from paceline.errors import ConfigError

    files: dict[str, Path] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--outputs {item}: give a name and a file, as NAME=FILE")
        if name in files:
            raise ConfigError(f"--outputs {item}: '{name}' is given twice")
        files[name] = Path(path)
    return files


def _print_seconds(console: Console, result: CollectionReport) -> None:
    """What each stage took, over decoding where this run decoded everything it replayed."""
    decode = result.seconds.get("decode", 0.0)
    fresh = result.num_decoded == result.num_prompts and decode > 0
    for stage, spent in result.seconds.items():
        share = f" ({spent / decode:.1%} of decoding)" if fresh and stage != "decode" else ""
        if spent > 0:
            console.print(f"{stage}: {spent:.1f} s{share}", highlight=False)
