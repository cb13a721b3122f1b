"""Prompts that no drafter was trained on, and the arms that compete on them. Runs no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from paceline.config import DrafterSection
from paceline.drafting.catalog import find_kind
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.suffix_lookup import SuffixLookup
from paceline.errors import ConfigError
from paceline.experiments.prompt_files import TASKS
from paceline.store import TrainedOn, is_collection, read_prompts, take_part_of_files
from paceline.store.collection import open_trajectories, read_trajectories
from paceline.store.trained_on import join

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from pathlib import Path

    from paceline.config import Config
    from paceline.contracts import PromptRecord

CASCADE = "cascade"


class UnseenPrompts(NamedTuple):
    """Prompts of each task to collect and others to time, and the number of unseen ones of
    both parts by task."""

    collected: list[PromptRecord]
    timed: list[PromptRecord]
    num_unseen: dict[str, int]


def read_unseen(
    folder: Path, trained: Container[str], num_collected: int, num_timed: int
) -> UnseenPrompts:
    """Return the prompts of a data folder's tasks that are not in `trained`, of the part to collect and
    of the part to time.

    A task with fewer prompts than are to be collected has all of its part collected. Raises ConfigError
    if a file is missing or has too few unseen prompts.
    """
    files = [_read_task(folder, task) for task in TASKS]
    found = UnseenPrompts([], [], {})
    to_collect, to_time = (take_part_of_files(files, part) for part in ("collection", "judging"))
    for task, first, second in zip(TASKS, to_collect, to_time, strict=True):
        collected = [record for record in first if record.prompt not in trained]
        timed = [record for record in second if record.prompt not in trained]
        if len(timed) < num_timed or not collected:
            raise ConfigError(
                f"{folder / task}.jsonl: no drafter was trained on {len(timed)} of the prompts to time "
                f"and {len(collected)} of those to collect, which is too few to time {num_timed} and "
                "collect others; lower --per-task"
            )
        found.collected.extend(collected[:num_collected])
        found.timed.extend(timed[:num_timed])
        found.num_unseen[task] = len(collected) + len(timed)
    return found


def _read_task(folder: Path, task: str) -> list[PromptRecord]:
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder}: no {path.name} in this data folder; name another by --data")
    return read_prompts([path])


def trained_on(config: Config) -> TrainedOn:
    """Return the prompts that any of the configuration's draft models was trained on.

    Raises ConfigError if that is unknown for one of them.
    """
    records = []
    for name, section in config.drafters.items():
        if "model" in section.settings:
            record = TrainedOn.load(section.settings["model"])
            if record is None:
                raise ConfigError(
                    f"drafter '{name}': {section.settings['model']} has no record of the prompts that "
                    "it was trained on; leave it out of the configuration, or distil it again"
                )
            records.append(record)
    joined = join(records)
    assert joined is not None  # each record is known
    return joined


def add_cascades(config: Config) -> Config:
    """Return the configuration with a cascade of the lookup and each draft model, if it has none.

    Raises ConfigError if it has no `suffix_lookup` to begin with.
    """
    kinds = {name: find_kind(name, section.kind) for name, section in config.drafters.items()}
    lookups = [name for name, kind in kinds.items() if kind is SuffixLookup]
    if not lookups:
        raise ConfigError("the configuration has no drafter of kind suffix_lookup; add one")
    if any(kind.kind == CASCADE for kind in kinds.values()):
        return config
    lookup, models = lookups[0], [name for name, kind in kinds.items() if kind is DraftModel]
    cascades = {
        f"{lookup}-{model}": DrafterSection(kind=CASCADE, settings={"parts": [lookup, model]})
        for model in models
    }
    return config.model_copy(update={"drafters": {**config.drafters, **cascades}})


def check_collection(store: Path, collected: Sequence[PromptRecord]) -> None:
    """Raise ConfigError if a collection has prompts other than those to collect, which may be timed."""
    if not is_collection(store):
        return
    wanted = {record.id for record in collected}
    rows = read_trajectories(open_trajectories(store))
    others = [row.prompt_id for row in rows if row.prompt_id not in wanted]
    if others:
        raise ConfigError(
            f"{store}: {len(others)} of its prompts are not among those to collect ({others[0]}); name "
            "another --folder, or give the options that it was made with"
        )
