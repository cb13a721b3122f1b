"""Prompts of a data folder: a JSONL file per task, and Spec-Bench's questions. Knows no models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from paceline.contracts import PromptRecord
from paceline.errors import ConfigError
from paceline.store import read_prompts, take_by_hash

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

TASKS: Final = ("translation", "math", "code", "summary")


def read_tasks(
    folder: Path, num_collected: int, num_timed: int, without: Collection[str] = ()
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Return prompts per task to collect and others to time, from opposite ends by hash of id.

    without: ids to leave out. Raises ConfigError if a file is missing or has too few prompts.
    """
    collected: list[PromptRecord] = []
    timed: list[PromptRecord] = []
    for task in TASKS:
        path = folder / f"{task}.jsonl"
        if not path.is_file():
            raise ConfigError(
                f"{folder}: no {path.name} in this data folder; it needs "
                f"{', '.join(f'{name}.jsonl' for name in TASKS)}"
            )
        records = [record for record in read_prompts([path]) if record.id not in without]
        ranked = take_by_hash(records, None)
        if len(ranked) < num_collected + num_timed:
            raise ConfigError(
                f"{path}: {num_collected + num_timed} prompts are needed, but it has {len(ranked)}"
            )
        collected += ranked[:num_collected]
        timed += ranked[len(ranked) - num_timed :]
    return collected, timed


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
