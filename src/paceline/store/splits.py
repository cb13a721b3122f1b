"""The parts of prompts: to train drafters on, to collect and learn from, and to judge on.

A prompt's part follows from the hash of its id, so the order of lines is irrelevant and added prompts
move no others. No text is in two parts of the records that are given together: white space aside, a
text is kept in the first of `judging`, `collection` and `training` that has it, once. Of records that
are not given together, only the parts of ids are known to agree. Knows no files and no models.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, Literal

from paceline.store.prompts import take_by_hash
from paceline.store.trained_on import hash_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import PromptRecord

Part = Literal["training", "collection", "judging", "all"]

_BELOW: Final[dict[Part, float]] = {"judging": 0.04, "collection": 0.12, "training": 1.0}
"""The parts in the order in which they keep a text, and the least upper bound of their hashes."""


def hash_share(text: str) -> float:
    """Return a number from 0 to 1 that depends on the text alone and is spread evenly."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def part_of(id: str) -> Part:
    """Return the part of an id: `judging` has 4% of all ids, `collection` 8%, `training` the rest."""
    number = hash_share(id)
    # a hash of 2**64 - 1 is rounded to 1
    return next((part for part, below in _BELOW.items() if number < below), "training")


def is_validation(id: str, share: float) -> bool:
    """Return whether an id is in the validation share of its part.

    This hash is independent of the one that `part_of` and `take_by_hash` use, so that every part and
    every cap has the same share.
    """
    return hash_share(f"validation/{id}") < share


def take_part(records: Sequence[PromptRecord], part: Part) -> list[PromptRecord]:
    """Return the prompts of a part, by hash of id; `all` returns every record in its place.

    Of records with one text, at most one is returned, and none if an earlier part has the text.
    """
    return take_part_of_files([records], part)[0]


def take_part_of_files(
    files: Sequence[Sequence[PromptRecord]], part: Part
) -> list[list[PromptRecord]]:
    """Return the prompts of a part of each file, such that no text is in two parts or in two files.

    Of records with one text and one part, the first file's with the lowest hash of its id is returned.
    """
    if part == "all":
        return [list(records) for records in files]
    taken: list[list[PromptRecord]] = [[] for _ in files]
    seen: set[int] = set()
    for current in _BELOW:
        for records, of_file in zip(files, taken, strict=True):
            for record in take_by_hash([r for r in records if part_of(r.id) == current], None):
                text = hash_prompt(record.prompt)
                if text not in seen and current == part:
                    of_file.append(record)
                seen.add(text)
        if current == part:
            break
    return taken
