"""Options that several verbs share, and how they override the configuration file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import Config, LearningSection
    from paceline.contracts import PromptRecord

ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file that names target, drafters and settings.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16 or float16, for the target and drafters that name none.",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or mps, where drafters name none.")
]
Exact = Annotated[
    bool | None,
    typer.Option(
        "--exact/--no-exact",
        help="Refuse a target whose bfloat16 text may depend on drafter or batch.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads.")]
Store = Annotated[Path | None, typer.Option(help="Folder of the collection.")]
Costs = Annotated[Path | None, typer.Option(help="File of the cost table.")]
Policy = Annotated[Path | None, typer.Option(help="Folder of the policy.")]
Objective = Annotated[
    str | None,
    typer.Option(help="throughput (default), latency, or a weight from 1 to 0 between them."),
]
Part = Annotated[
    str, typer.Option(help="Part of the prompts: training, collection, judging or all.")
]
Plot = Annotated[Path | None, typer.Option(help="PNG file of a figure to write.")]
Raw = Annotated[bool, typer.Option("--raw", help="Use the text as it is, without a chat template.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; may be repeated."),
]
DEFAULT_CONFIG = Path("paceline.yaml")


def configured(
    path: Path,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    exact: bool | None = None,
    **paths: Path | None,
) -> Config:
    """Read the configuration file, override it with flags and validate it again."""
    from paceline.config import Config, load_config, parse

    raw: dict[str, Any] = load_config(path).model_dump()
    for key, value in (("dtype", dtype), ("device", device)):
        if value is None:
            continue
        raw["target"][key] = value
        for drafter in raw["drafters"].values():
            if "model" in drafter["settings"]:
                drafter["settings"].setdefault(key, value)
    if threads is not None:
        raw["threads"] = threads
    if exact is not None:
        raw["exact"] = exact
    raw["paths"].update({k: v.resolve() for k, v in paths.items() if v is not None})
    return parse(Config, raw, "command line")


def learning_with(config: Config, **flags: Any) -> Config:
    """Override the section `learning` with the flags that are not None, and validate it again."""
    from paceline.config import LearningSection, parse

    flags["objective"] = _number_or_name(flags["objective"])
    raw = config.learning.model_dump() | given(flags)
    section: LearningSection = parse(LearningSection, raw, "learning")
    return config.model_copy(update={"learning": section})


def _number_or_name(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def messages_of(prompt: str, raw: bool, tokenizer: object) -> Any:
    """Return a prompt, or the text from stdin for '-', as a user's message if there is a chat template.

    raw: return the text as it is.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    has_template = getattr(tokenizer, "chat_template", None) is not None
    return text if raw or not has_template else [{"role": "user", "content": text}]


def taken_part(records: Sequence[PromptRecord], part: str) -> list[PromptRecord]:
    """Return the prompts of a part. Raises ConfigError on another name, or if it has no prompt."""
    from typing import cast, get_args

    from paceline.errors import ConfigError
    from paceline.store import Part, take_part

    if part not in get_args(Part):
        raise ConfigError(f"--part '{part}': must be one of {', '.join(get_args(Part))}")
    taken = take_part(records, cast("Part", part))
    if records and not taken:
        raise ConfigError(
            f"--part {part}: none of the {len(records)} prompts is in it; give more prompts or "
            "--part all"
        )
    return taken


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that have a value."""
    return {name: value for name, value in flags.items() if value is not None}


def assigned(assignments: Sequence[str] | None) -> dict[str, Any]:
    """Return the settings of `--set KEY=VALUE`. Raises ConfigError if a value is not YAML."""
    import yaml

    from paceline.errors import ConfigError, shorten

    found: dict[str, Any] = {}
    for key, value in named("--set", assignments, "KEY=VALUE").items():
        try:
            found[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(
                f"--set {key}: {shorten(value)} is not YAML; close its brackets and quotes, and "
                "quote it for the shell"
            ) from error
    return found


def named(option: str, values: Sequence[str] | None, form: str) -> dict[str, str]:
    """Return name -> value of an option such as NAME=FILE. Raises ConfigError where one is missing."""
    from paceline.errors import ConfigError

    found: dict[str, str] = {}
    for text in values or ():
        name, _, value = text.partition("=")
        if not name or not value:
            raise ConfigError(f"{option} '{text}': give {form}")
        if name in found:
            raise ConfigError(f"{option} '{text}': '{name}' is given twice")
        found[name] = value
    return found
