"""Skip sets that `layer-search` finds for an experiment: one for all tasks, and one per task.

The development prompts are the workbench's timed prompts, which are never collected, so no prompt that
a set is judged on was searched on. A stopped search continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from paceline.costs import CostTable
from paceline.layer_search import SearchReport, SearchSettings, search_layers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.experiments.workbench import Workbench

ALL_TASKS: Final = "searched"
TRIALS: Final = 120
_SMOKE_TRIALS: Final = 3
_MAX_NEW_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class SearchedSet:
    """The best set of a search, in its file, and the search."""

    path: Path
    num_prompts: int
    report: SearchReport


def search_sets(bench: Workbench, folder: Path, num_draft_tokens: int) -> dict[str, SearchedSet]:
    """Return name -> the set found for all tasks, and those found for each task.

    All searches use the cost table of the first, which is measured once.
    """
    settings = SearchSettings(
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=min(_MAX_NEW_TOKENS, bench.sizes.max_new_tokens),
    )
    trials = _SMOKE_TRIALS if bench.sizes.smoke else TRIALS
    development = bench.prompts.timed
    by_name = {ALL_TASKS: [record.prompt for record in development]}
    for record in development:
        by_name.setdefault(f"{ALL_TASKS}-{record.domain}", []).append(record.prompt)
    found: dict[str, SearchedSet] = {}
    first = folder / f"{ALL_TASKS}.json"
    for name, prompts in by_name.items():
        path = folder / f"{name}.json"
        table = CostTable.load(first.with_suffix(".costs.json")) if found else None
        report = search_layers(
            bench.pace,
            _encode(bench, prompts),
            path,
            settings,
            trials,
            costs=table,
            on_progress=bench.on_progress,
        )
        found[name] = SearchedSet(path, len(prompts), report)
    return found


def _encode(bench: Workbench, prompts: Sequence[str]) -> list[list[int]]:
    return [bench.pace.encode([{"role": "user", "content": prompt}]) for prompt in prompts]
