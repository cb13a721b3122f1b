"""Options that several verbs share, and how they override the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from paceline.config import Config

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The YAML that names target, drafters, settings.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16 or float16, for the target and drafters that name none.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or mps, where drafters name none.")
]
ExactOption = Annotated[
    bool | None,
    typer.Option("--exact/--no-exact", help="Same text for every drafter in bfloat16, too."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="CPU threads.")]
DEFAULT_CONFIG = Path("paceline.yaml")


def configured(
    path: Path,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    exact: bool | None = None,
    **paths: Path | None,
) -> Config:
    """The configuration file with flags laid over it, validated again."""
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
