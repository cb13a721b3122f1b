"""A skip set that `layer-search` finds for an experiment.

The development prompts are the workbench's timed prompts, which are never collected, so no prompt that
the set is judged on was searched on. A stopped search continues.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.layer_search import SearchReport, SearchSettings, search_layers

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.experiments.workbench import Workbench

TRIALS: Final = 80
_SMOKE_TRIALS: Final = 3
_MAX_NEW_TOKENS: Final = 64


def search_set(bench: Workbench, path: Path, num_draft_tokens: int) -> SearchReport:
    """Search a skip set for drafts of a length, and write it to a file."""
    settings = SearchSettings(
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=min(_MAX_NEW_TOKENS, bench.sizes.max_new_tokens),
    )
    messages = [[{"role": "user", "content": record.prompt}] for record in bench.prompts.timed]
    return search_layers(
        bench.pace,
        [bench.pace.encode(message) for message in messages],
        path,
        settings,
        _SMOKE_TRIALS if bench.sizes.smoke else TRIALS,
        on_progress=bench.on_progress,
    )
