"""`paceline demo`: the main job on the bundled models, with a table, a figure and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.next_steps import command, say

_PROMPT = "Translate English to French: The function returns a new list."


def demo(
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    out: Annotated[Path, typer.Option(help="Folder of the demo's files.")] = Path("demo-output"),
    timed: Annotated[int, typer.Option(min=1, help="Timed prompts per task.")] = 8,
    collected: Annotated[int, typer.Option(min=1, help="Prompts per task to learn from.")] = 48,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 96,
    dtype: options.Dtype = None,
    exact: options.Exact = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Collect, measure and learn, then decode new prompts by the clock: the main job in minutes."""
    import shutil
    from time import perf_counter

    from rich.console import Console

    from paceline.cli.progress import progress
    from paceline.errors import ConfigError
    from paceline.experiments.demo_job import demo as run_demo
    from paceline.experiments.demo_report import (
        accepted_table,
        chosen_table,
        is_of_demo,
        sentences,
        table,
        write_config,
        write_figure,
        write_json,
    )
    from paceline.verbs.pipeline import in_folder

    began = perf_counter()
    console = Console()
    settings = options.configured(config, dtype, device, threads, exact)
    own_config = out / "paceline.yaml"
    if own_config.exists() and not is_of_demo(own_config):
        raise ConfigError(
            f"{own_config}: was not written by a demo; name another folder with --out"
        )
    console.print(
        f"target [bold]{Path(settings.target.model).name}[/], drafters "
        f"[bold]{', '.join(settings.drafters)}[/]"
    )
    work = out / "work"
    if work.exists():
        shutil.rmtree(work)  # every run measures anew
    with progress(console) as report:
        result = run_demo(settings, work, collected, timed, max_new_tokens, report)
    write_config(in_folder(settings, work.resolve()), own_config)
    write_json(result, out / "demo.json")
    write_figure(result, out / "demo.png")
    console.print()
    console.print(table(result))
    console.print(accepted_table(result))
    console.print(chosen_table(result))
    for line in sentences(result):
        console.print(f"- {line}", highlight=False)
    facts = result.circumstances
    console.print(
        f"\n[dim]{facts['cpu']} ({facts['cpu_capability']}), {facts['threads']} threads, "
        f"{result.settings['dtype']}, torch {facts['torch']}; {perf_counter() - began:.0f} s in all[/]"
    )
    say(console, f"written: {out / 'demo.png'}, {out / 'demo.json'}, {own_config}")
    say(console, "\nTry next:")
    made = ("--config", own_config)
    steps = [command("generate", _PROMPT, *made, "--stats"), command("doctor", *made)]
    if result.settings["dtype"] != "float32":
        steps.append(command("demo", "--dtype", "float32"))
    for step in steps:
        say(console, f"  {step}")
