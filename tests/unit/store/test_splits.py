"""The parts of prompts: no text in two of them, and no prompt that moves."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, get_args

from paceline.contracts import PromptRecord
from paceline.store import is_validation, part_of, take_by_hash, take_part, take_part_of_files
from paceline.store.splits import Part

if TYPE_CHECKING:
    from collections.abc import Iterable

PARTS: list[Part] = ["judging", "collection", "training"]


def records(count: int, name: str = "p") -> list[PromptRecord]:
    return [PromptRecord(f"{name}/{i}", "d", f"text {name} {i}") for i in range(count)]


def ids_of(part: Part, count: int, name: str = "p") -> list[str]:
    found = (f"{name}/{i}" for i in range(10_000))
    return [id for id in found if part_of(id) == part][:count]


def ids(given: Iterable[PromptRecord]) -> set[str]:
    return {record.id for record in given}


def test_shares_and_parts_follow_from_the_hash_of_the_id() -> None:
    given = records(5000)
    parts = {part: take_part(given, part) for part in PARTS}
    shares = [len(parts[part]) / len(given) for part in PARTS]
    assert abs(shares[0] - 0.04) < 0.01 and abs(shares[1] - 0.08) < 0.01
    assert sum(map(len, parts.values())) == len(ids(r for p in parts.values() for r in p)) == 5000
    for record in given[:500]:
        number = int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:8], "big") / 2**64
        expected = "judging" if number < 0.04 else "collection" if number < 0.12 else "training"
        assert part_of(record.id) == expected
        assert record in parts[part_of(record.id)]


def test_neither_the_order_of_lines_nor_added_prompts_move_a_prompt() -> None:
    given = records(2000)
    mixed = given.copy()
    random.Random(0).shuffle(mixed)
    for part in PARTS:
        few = take_part(given, part)
        assert take_part(mixed, part) == few == take_by_hash(few, None)
        assert ids(few) <= ids(take_part(given + records(2000, "q"), part))


def test_a_text_is_in_its_first_part_only_and_once() -> None:
    """Different ids with one text, also in other white space: a split by id alone would share it."""
    judging, collection, training = (ids_of(part, 3) for part in PARTS)
    given = [
        PromptRecord(training[0], "d", "shared by all"),
        PromptRecord(collection[0], "d", "shared  by\nall"),
        PromptRecord(judging[0], "d", " shared by all"),
        PromptRecord(training[1], "d", "of two"),
        PromptRecord(collection[1], "d", "of  two"),
        PromptRecord(training[2], "d", "own"),
        *(PromptRecord(id, "d", "repeated") for id in ids_of("training", 9)[3:]),
    ]
    lowest = take_by_hash([PromptRecord(id, "", "") for id in ids_of("training", 9)[3:]], 1)
    for order in (given, given[::-1]):
        assert ids(take_part(order, "judging")) == {judging[0]}
        assert ids(take_part(order, "collection")) == {collection[1]}
        assert ids(take_part(order, "training")) == {training[2], lowest[0].id}
        assert take_part(order, "all") == order


def test_a_text_is_in_one_part_and_one_file_of_several() -> None:
    """A text that one file judges on must not be in another file's training part."""
    judged, trained = ids_of("judging", 1)[0], ids_of("training", 2, "q")
    first = [PromptRecord(trained[0], "d", "judged elsewhere"), PromptRecord("a", "d", "same")]
    second = [PromptRecord(judged, "d", "judged elsewhere"), PromptRecord("a", "d", "same")]
    assert part_of("a") == "training"

    assert take_part_of_files([first, second], "judging") == [[], [second[0]]]
    assert take_part_of_files([first, second], "training") == [[first[1]], []]
    assert take_part_of_files([first, second], "all") == [first, second]


def test_validation_is_independent_of_the_parts_and_of_the_order_of_caps() -> None:
    """The lowest hashes of ids are the judging part: validation by them would be empty or all of it."""
    given = records(8000)
    for part in get_args(Part):
        for some in (take_part(given, part), take_by_hash(take_part(given, part), 300)):
            share = sum(is_validation(r.id, 0.2) for r in some) / len(some)
            assert 0.13 < share < 0.27, part
