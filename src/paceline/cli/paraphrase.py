"""`paceline paraphrase`: the four tasks' prompts with other instructions, or with none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.next_steps import say


def paraphrase(
    prompts: Annotated[Path, typer.Argument(metavar="IN", help="JSONL with id, domain, prompt.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL to write.")],
    kind: Annotated[
        str, typer.Option(help="paraphrased: another instruction; bare: none.")
    ] = "paraphrased",
    use: Annotated[
        str, typer.Option(help="Set of instructions: train or test; they are disjoint.")
    ] = "test",
) -> None:
    """Reword prompts, to test whether a policy depends on their first line."""
    from typing import cast, get_args

    from rich.console import Console

    from paceline.errors import ConfigError
    from paceline.experiments.paraphrases import Kind, Use, rewrite
    from paceline.store import read_prompts

    for name, value, valid in (("kind", kind, get_args(Kind)), ("use", use, get_args(Use))):
        if value not in valid:
            raise ConfigError(f"--{name} must be {' or '.join(valid)}, got '{value}'")
    variants = rewrite(read_prompts([prompts]), out, cast("Kind", kind), cast("Use", use))
    say(Console(), f"{len(variants)} prompts in {out}")
