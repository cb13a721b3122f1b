"""Prompts of a data folder: a JSONL file per task, and Spec-Bench's questions. Knows no models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NamedTuple

from paceline.contracts import PromptRecord
from paceline.errors import ConfigError
from paceline.store import read_prompts, take_by_hash
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from paceline.store import TrainedOn

TASKS: Final = ("translation", "math", "code", "summary")


class PromptSets(NamedTuple):
    """Prompts to collect and learn from, others to time, which no policy has seen, and the number of
    prompts left out because a drafter was trained on them.
    """

    collected: list[PromptRecord]
    timed: list[PromptRecord]
    num_left_out: int = 0


def read_tasks(
    folder: Path,
    num_collected: int,
    num_timed: int,
    without: Collection[str] = (),
    trained_on: TrainedOn = NOTHING,
) -> PromptSets:
    """Return prompts per task to collect and others to time, from opposite ends by hash of id.

    without: ids to leave out. trained_on: prompts to leave out; a task of which too few others are left
    gives all of them. Raises ConfigError if a file is missing or has too few prompts to begin with, or
    none besides those to time.
    """
    collected: list[PromptRecord] = []
    timed: list[PromptRecord] = []
    num_left_out = 0
    for task in TASKS:
        path = folder / f"{task}.jsonl"
        if not path.is_file():
            raise ConfigError(
                f"{folder}: no {path.name} in this data folder; it needs "
                f"{', '.join(f'{name}.jsonl' for name in TASKS)}"
            )
        records = [record for record in read_prompts([path]) if record.id not in without]
        if len(records) < num_collected + num_timed:
            raise ConfigError(
                f"{path}: {num_collected + num_timed} prompts are needed, but it has {len(records)}"
            )
        unseen = [record for record in records if record.prompt not in trained_on]
        num_left_out += len(records) - len(unseen)
        if len(unseen) < min(num_collected, 1) + num_timed:
            raise ConfigError(
                f"{path}: drafters were trained on all but {len(unseen)} of its {len(records)} prompts; "
                "add prompts to the file"
            )
        ranked = take_by_hash(unseen, None)
        first_timed = len(ranked) - num_timed
        collected += ranked[: min(num_collected, first_timed)]
        timed += ranked[first_timed:]
    return PromptSets(collected, timed, num_left_out)


def read_spec_bench(path: Path) -> list[PromptRecord]:
    """Return the first turn of every question; later turns need its answer."""
    records = []
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            raw = json.loads(line)
            id, turns = f"spec_bench/{raw['question_id']}", raw["turns"]
            records.append(PromptRecord(id, str(raw["category"]), str(turns[0])))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ConfigError(f"{path}:{number}: not a Spec-Bench question ({error!r})") from error
    return records
