"""Small prompt files whose ids are in chosen parts."""

from __future__ import annotations

import json
from itertools import count, islice
from typing import TYPE_CHECKING

from paceline.store import Part, part_of

if TYPE_CHECKING:
    from pathlib import Path


def ids_of_part(part: Part, num: int, name: str) -> list[str]:
    """Return the first ids `name/0`, `name/1`, ... that are in a part."""
    return list(islice((id for i in count() if part_of(id := f"{name}/{i}") == part), num))


def write_task(folder: Path, task: str, num_collection: int = 10, num_judging: int = 6) -> None:
    """Write a task's file with prompts to collect and prompts to judge on."""
    ids = ids_of_part("collection", num_collection, task)
    ids += ids_of_part("judging", num_judging, task)
    lines = [
        json.dumps({"id": id, "domain": task, "prompt": f"{task} {i}: " + "ab " * i})
        for i, id in enumerate(ids)
    ]
    (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
