"""Prompts that no drafter was trained on, and the arms that compete on them. Runs no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from paceline.config import DrafterSection
from paceline.drafting.catalog import find_kind
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.suffix_lookup import SuffixLookup
from paceline.errors import ConfigError
from paceline.experiments.prompt_files import TASKS
from paceline.store import TrainedOn, is_collection, read_prompts, take_by_hash
from paceline.store.collection import open_trajectories, read_trajectories
from paceline.store.trained_on import hash_prompt, join

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from pathlib import Path

    from paceline.config import Config
    from paceline.contracts import PromptRecord

CASCADE = "cascade"


class UnseenPrompts(NamedTuple):
    """Prompts of each task to collect and others to time, and the number of unseen ones by task."""

    collected: list[PromptRecord]
    timed: list[PromptRecord]
    num_unseen: dict[str, int]


def read_unseen(
    folder: Path, trained: Container[str], num_collected: int, num_timed: int
) -> UnseenPrompts:
    """Return the prompts of a data folder's tasks that are not in `trained`.

    A task with fewer prompts gives the number to time, and has the rest collected. Raises ConfigError
    if a file is missing or has too few unseen prompts.
    """
    found = UnseenPrompts([], [], {})
    for task in TASKS:
        path = folder / f"{task}.jsonl"
        if not path.is_file():
            raise ConfigError(
                f"{folder}: no {path.name} in this data folder; name another by --data"
            )
        unseen = [record for record in read_prompts([path]) if record.prompt not in trained]
        collected, timed = split_by_hash(unseen, num_collected, num_timed)
        if len(timed) < num_timed or not collected:
            raise ConfigError(
                f"{path}: no drafter was trained on {len(collected) + len(timed)} of its prompts, "
                f"which is too few to time {num_timed} and collect others; lower --per-task"
            )
        found.collected.extend(collected)
        found.timed.extend(timed)
        found.num_unseen[task] = len({hash_prompt(record.prompt) for record in unseen})
    return found


def split_by_hash(
    records: Sequence[PromptRecord], num_collected: int, num_timed: int
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Return prompts to collect and others to time, from opposite ends by hash of id.

    Of prompts with one text only the first is used, so that no text is in both. Where there are too few
    for both, the number to collect is lower.
    """
    by_text = {
        hash_prompt(record.prompt): record for record in reversed(take_by_hash(records, None))
    }
    ranked = take_by_hash(list(by_text.values()), None)
    first_timed = max(len(ranked) - num_timed, 0)
    return ranked[: min(num_collected, first_timed)], ranked[first_timed:]


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
