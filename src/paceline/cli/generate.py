"""`paceline generate`: complete a prompt and, on request, print its cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from paceline.cli import options
from paceline.cli.next_steps import say
from paceline.contracts import DEFAULT_NEW_TOKENS

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.contracts import Completion


_DEFAULT: Final = "Default: the model's own, else"


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt, or '-' to read it from stdin.")],
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    drafter: Annotated[
        str, typer.Option("--drafter", "-d", help="auto, none, or a drafter's name.")
    ] = "auto",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help=f"Maximum number of new tokens. {_DEFAULT} {DEFAULT_NEW_TOKENS}."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help=f"0 is greedy. {_DEFAULT} 0.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help=f"Keep the k most likely tokens; 0 is off. {_DEFAULT} 0.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help=f"Keep the nucleus of this mass; 1 is off. {_DEFAULT} 1.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help=f"Drop tokens below this share of the best. {_DEFAULT} 0."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text with every drafter.")
    ] = None,
    sampling: Annotated[str, typer.Option(help="auto, residual, block or invariant.")] = "auto",
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    raw: options.Raw = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print the cost.")] = False,
    as_json: options.AsJson = False,
    costs: options.Costs = None,
    policy: options.Policy = None,
    dtype: options.Dtype = None,
    exact: options.Exact = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Complete a prompt with the drafter that the policy picks, or with a named one."""
    from rich.console import Console

    from paceline.assembly import load

    settings = options.configured(config, dtype, device, threads, exact, costs=costs)
    pace = load(settings, policy=policy)
    asked = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or None,
    }
    given: dict[str, Any] = {name: v for name, v in asked.items() if v is not None}
    messages = options.messages_of(prompt, raw, pace.parts.tokenizer)
    completion = pace.complete(messages, drafter=drafter, sampling=sampling, **given)
    for note in pace.notes:
        say(Console(stderr=True), f"note: {note}")
    console = Console()
    if as_json:
        record = asdict(completion)
        del record["decision"]["features"]  # hundreds of numbers that do not help a reader
        console.print_json(json.dumps(record))
        return
    console.print(completion.text, markup=False, highlight=False)
    if stats:
        print_stats(Console(stderr=True), completion)


def print_stats(console: Console, completion: Completion) -> None:
    """Print a small table of the completion's cost."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2))
    drafted = sum(r.drafted for r in completion.rounds)
    accepted = sum(r.accepted for r in completion.rounds)
    share = f"{accepted} of {drafted} ({accepted / drafted:.0%})" if drafted else "none drafted"
    scores = completion.decision.scores
    chosen = f"{completion.drafter}"
    if scores:
        ranked = sorted(scores.items(), key=lambda item: -item[1])[:3]
        chosen += "   (" + ", ".join(f"{name} {value:.2f}" for name, value in ranked) + ")"
    rows = {
        "drafter": chosen,
        "tokens": f"{len(completion.token_ids)} after {completion.num_prompt_tokens} of prompt",
        "finish": completion.finish_reason,
        "accepted": share,
        "block efficiency": f"{completion.block_efficiency:.2f} tokens per target forward",
        "tokens/s": f"{completion.tokens_per_second:.1f}",
        "seconds": ", ".join(
            f"{part} {value:.3f}" for part, value in asdict(completion.seconds).items()
        ),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
