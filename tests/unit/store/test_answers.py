"""The index of answers: its order, its bound, and its folder, which is replaced in one step."""

from __future__ import annotations

import json
import mmap
import random
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.errors import StoreError
from paceline.store import answers as module
from paceline.store.answers import (
    END,
    Answer,
    AnswerIndex,
    manifest_path,
    open_answers,
    write_answers,
)
from paceline.store.contexts import MAX_CONTEXT, sort_by_context

if TYPE_CHECKING:
    from pathlib import Path

ANSWERS = [Answer("a", [5, 6, 7]), Answer("b", []), Answer("a", [6, 7, 8, 9])]


def write(folder: Path, answers: list[Answer] = ANSWERS, max_tokens: int = 1000) -> bool:
    return write_answers(folder, answers, "tokenizer", "target", max_tokens)


def opened(folder: Path) -> AnswerIndex:
    index = open_answers(folder, "tokenizer", "target")
    assert index is not None
    return index


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("seed", range(40))
def test_places_are_sorted_by_the_tokens_before_them(seed: int) -> None:
    choose = random.Random(seed)
    ids = choose.choice([1, 2, 30])
    lengths = [choose.choice([0, 1, 3, 40, 90]) for _ in range(choose.randrange(1, 7))]
    texts = [[choose.randrange(ids) for _ in range(length)] + [END] for length in lengths]
    starts = np.cumsum([0, *map(len, texts)])

    def context(place: int) -> list[int]:
        first = max(start for start in starts if start <= place)
        return tokens[max(first, place - MAX_CONTEXT) : place][::-1]

    tokens = [token for text in texts for token in text]
    order = sort_by_context(np.array(tokens, dtype=np.int32), starts)

    assert order.tolist() == sorted(range(len(tokens)), key=lambda place: (context(place), place))


def test_an_empty_text_has_no_places() -> None:
    assert sort_by_context(np.zeros(0, np.int32), np.zeros(1, np.int64)).tolist() == []


def test_the_index_holds_the_answers_and_whose_they_are(tmp_path: Path) -> None:
    assert open_answers(tmp_path, "tokenizer") is None
    assert write(tmp_path)

    index = opened(tmp_path)

    assert index.tokens.tolist() == [5, 6, 7, END, END, 6, 7, 8, 9, END]
    assert index.starts.tolist() == [0, 4, 5, 10]
    assert (index.facts.num_tokens, index.facts.num_answers, index.facts.num_dropped) == (10, 3, 0)
    assert index.spans_of("a") == [(0, 4), (5, 10)]
    assert index.spans_of("b") == [(4, 5)]
    assert index.spans_of("c") == []


def test_the_same_prompt_under_another_id_is_the_same_prompt(tmp_path: Path) -> None:
    """A served prompt may have been collected, too."""
    write(
        tmp_path,
        [Answer("p1", [1], (8, 9)), Answer("served", [2], (8, 9)), Answer("p2", [3], (8,))],
    )

    index = opened(tmp_path)

    assert index.spans_of("p1") == index.spans_of("served") == [(0, 2), (2, 4)]
    assert index.spans_of("p2") == [(4, 6)]


def test_opening_maps_the_arrays_and_copies_none(tmp_path: Path) -> None:
    write(tmp_path)
    for array in opened(tmp_path)[2:]:
        assert isinstance(array.base.base, mmap.mmap) or isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_the_oldest_answers_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, max_tokens=6)

    index = opened(tmp_path)

    assert index.tokens.tolist() == [END, 6, 7, 8, 9, END]
    assert (index.facts.num_answers, index.facts.num_dropped) == (2, 1)


def test_the_same_answers_are_not_written_again(tmp_path: Path) -> None:
    write(tmp_path)
    before = content(tmp_path)

    assert not write(tmp_path)

    assert content(tmp_path) == before
    assert write(tmp_path, [*ANSWERS, Answer("c", [1])])
    assert opened(tmp_path).tokens[-2:].tolist() == [1, END]
    assert len(list(manifest_path(tmp_path).parent.iterdir())) == 2  # the manifest and one folder


def test_a_renewed_index_leaves_the_mapped_one_readable(tmp_path: Path) -> None:
    write(tmp_path)
    old = opened(tmp_path)
    write(tmp_path, [Answer("c", [1])])

    assert old.tokens.tolist() == [5, 6, 7, END, END, 6, 7, 8, 9, END]


def test_a_writer_that_is_stopped_leaves_the_old_index_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    more = [*ANSWERS, Answer("c", [1])]
    for stop_at in ("sort_by_context", "write_atomically"):

        def stop(*given: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(module, stop_at, stop)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, more)
        assert opened(tmp_path).facts.num_answers == 3

    write(tmp_path, more)

    fresh = tmp_path.with_name("fresh")
    write(fresh, more)
    assert content(tmp_path) == content(fresh)


def test_a_reader_takes_the_index_that_replaced_the_one_it_was_about_to_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    check = module._check

    def renew(*given: object) -> None:
        check(*given)
        monkeypatch.setattr(module, "_check", check)
        write(tmp_path, [Answer("c", [1])])

    monkeypatch.setattr(module, "_check", renew)

    assert opened(tmp_path).tokens.tolist() == [1, END]


@pytest.mark.parametrize("name", ["tokens", "order", "starts", "groups", "prompts"])
@pytest.mark.parametrize("harm", ["missing", "cut", "other", "empty"])
def test_a_damaged_index_is_refused_with_the_remedy(tmp_path: Path, name: str, harm: str) -> None:
    write(tmp_path)
    path = opened(tmp_path).folder / f"{name}.npy"
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        np.save(path, np.zeros(3))

    with pytest.raises(StoreError, match=rf"{name}\.npy.*delete this folder and run"):
        opened(tmp_path)
    assert write(tmp_path)  # `collect` writes it again
    assert opened(tmp_path).facts.num_answers == 3


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "other"}', '{"format": "paceline answers 1"}']
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    manifest_path(tmp_path).write_text(text)

    with pytest.raises(StoreError, match=r"damaged index of answers.*delete this folder"):
        opened(tmp_path)


def test_sizes_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    raw = json.loads(manifest_path(tmp_path).read_text())
    manifest_path(tmp_path).write_text(json.dumps({**raw, "num_tokens": "10"}))

    with pytest.raises(StoreError, match="it has '10' tokens of 3 answers"):
        opened(tmp_path)


def test_answers_of_another_tokenizer_or_target_are_refused(tmp_path: Path) -> None:
    write(tmp_path)

    with pytest.raises(
        StoreError, match=r"another tokenizer \(tokenizer\).*\(other\).*name another"
    ):
        open_answers(tmp_path, "other")
    with pytest.raises(StoreError, match=r"another target \(target\).*\(other\)"):
        open_answers(tmp_path, "tokenizer", "other")
    assert open_answers(tmp_path, "tokenizer") is not None


def test_a_deleted_index_is_none(tmp_path: Path) -> None:
    write(tmp_path)
    shutil.rmtree(manifest_path(tmp_path).parent)

    assert open_answers(tmp_path, "tokenizer") is None
