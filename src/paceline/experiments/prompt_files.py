"""Prompts of a data folder: a JSONL file per task, and Spec-Bench's questions. Knows no models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NamedTuple

from paceline.contracts import PromptRecord
from paceline.errors import ConfigError
from paceline.store import read_prompts, take_part_of_files
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from paceline.store import Part, TrainedOn

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
    """Return prompts per task to collect and others to time, of the parts for these two uses.

    without: ids to leave out. trained_on: prompts to leave out; a task of which too few others are left
    to collect gives all of them. Raises ConfigError if a file is missing, if its parts have too few
    prompts to begin with, or none to collect or too few to time that are new to all drafters.
    """
    files = [_read_task(folder, task) for task in TASKS]
    found: dict[Part, list[PromptRecord]] = {}
    num_left_out = 0
    needs: list[tuple[Part, int, int]] = [
        ("collection", num_collected, min(num_collected, 1)),
        ("judging", num_timed, num_timed),
    ]
    for part, needed, least in needs:
        found[part] = []
        for task, of_part in zip(TASKS, take_part_of_files(files, part), strict=True):
            where = f"{folder / f'{task}.jsonl'}: "
            given = [record for record in of_part if record.id not in without]
            unseen = [record for record in given if record.prompt not in trained_on]
            if len(given) < needed:
                raise ConfigError(
                    f"{where}{needed} prompts of the part '{part}' are needed, but it has "
                    f"{len(given)}; add prompts to the file"
                )
            if len(unseen) < least:
                raise ConfigError(
                    f"{where}drafters were trained on all but {len(unseen)} of the {len(given)} "
                    f"prompts of its part '{part}'; add prompts to the file"
                )
            num_left_out += len(given) - len(unseen)
            found[part] += unseen[:needed]
    return PromptSets(found["collection"], found["judging"], num_left_out)


def _read_task(folder: Path, task: str) -> list[PromptRecord]:
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no {path.name} in this data folder; it needs "
            f"{', '.join(f'{name}.jsonl' for name in TASKS)}"
        )
    return read_prompts([path])


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
