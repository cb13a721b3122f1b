"""`paceline layer-search`: find the sub-layers that a target may skip when it drafts for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.next_steps import say


def layer_search(
    data: Annotated[
        list[Path], typer.Argument(help="JSONL files with id, domain and prompt on each line.")
    ],
    out: Annotated[Path, typer.Option(help="File of the skip set to write.")] = Path(
        "runs/skip-set.json"
    ),
    config: options.ConfigFile = options.DEFAULT_CONFIG,
    trials: Annotated[
        int, typer.Option(min=1, help="Number of subsets to try, earlier runs included.")
    ] = 200,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after this time.")] = None,
    objective: Annotated[
        str, typer.Option(help="predicted (priced with a cost file) or measured (by the clock).")
    ] = "predicted",
    costs: Annotated[
        Path | None, typer.Option(help="Cost file of an earlier search. Default: next to --out.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of development prompts.")] = 8,
    part: options.Part = "all",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of new tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search.")] = None,
    setting: options.Assignments = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Search by Bayesian optimisation which layers to skip; write them for `layer_skip`. Resumes."""
    from rich.console import Console

    from paceline.assembly import Pace, build
    from paceline.cli.progress import progress
    from paceline.config import parse
    from paceline.costs import CostTable
    from paceline.layer_search import SearchReport, SearchSettings, plot, search_layers
    from paceline.plotting import import_figure
    from paceline.store import read_prompts, take_by_hash

    import_figure("search")  # fails before the work is done
    flags = {"objective": objective, "max_new_tokens": max_new_tokens, "seed": seed}
    raw = options.given(flags) | options.assigned(setting)
    settings = parse(SearchSettings, raw, "layer-search")
    records = take_by_hash(options.taken_part(read_prompts(data), part), prompts)
    table = CostTable.load(costs) if costs is not None else None
    # only the target is used, so the drafters of the configuration need not exist yet
    chosen = options.configured(config, dtype, device, threads).model_copy(update={"drafters": {}})
    pace = Pace(build(chosen))
    console = Console()

    def on_best(report: SearchReport) -> None:
        best = report.best
        console.print(
            f"trial {len(report.trials)}: {report.speedup(best):.2f}x without "
            f"{len(best.skip_attention)} attentions and {len(best.skip_mlp)} MLPs, "
            f"{best.acceptance:.0%} accepted",
            highlight=False,
        )

    with progress(console) as report:
        found = search_layers(
            pace,
            [pace.encode(_prompt(pace, record.prompt)) for record in records],
            out,
            settings,
            trials,
            minutes,
            table,
            report,
            on_best,
        )
    picture = out.with_suffix(".png")
    plot(found, picture)
    best = found.best
    if found.speedup(best) <= 1:
        say(
            console,
            "no set is faster than the target alone; `layer_skip` does not pay for this target",
        )
    say(console, f"skip_attention: {list(best.skip_attention)}")
    say(console, f"skip_mlp: {list(best.skip_mlp)}")
    say(console, f"written: {out}, {picture}")


def _prompt(pace: Any, text: str) -> Any:
    """Return a message if the target has a chat template, else the text, as every other verb does."""
    if getattr(pace.parts.tokenizer, "chat_template", None) is None:
        return text
    return [{"role": "user", "content": text}]
