"""`paceline route`: the saved policy's choice for a prompt, without an answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import say


def route(
    prompt: Annotated[str, typer.Argument(help="The prompt, or '-' to read it from stdin.")],
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of the answer, if known.")
    ] = None,
    raw: options.Raw = False,
    as_json: options.AsJson = False,
    costs: options.Costs = None,
    policy: options.Policy = None,
    dtype: options.Dtype = None,
    exact: options.Exact = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Print the drafter that the saved policy chooses for a prompt, also one that runs elsewhere."""
    from rich.console import Console

    from paceline.verbs.route import load_router

    settings = options.configured(config, dtype, device, threads, exact, costs=costs, policy=policy)
    router = load_router(settings)
    decision = router.choose(options.messages_of(prompt, raw, router.tokenizer), max_new_tokens)
    for note in router.notes:
        say(Console(stderr=True), f"note: {note}")
    if not as_json:
        Console().print(decision.arm, markup=False, highlight=False)
        return
    record = asdict(decision)
    del record["features"]  # hundreds of numbers that do not help a reader
    Console().print_json(json.dumps(record))
