"""Pre-training text: every token once, the same for a seed, and nothing that is judged."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paceline.distillation import DistillSettings
from paceline.distillation.batches import Example, collate
from paceline.distillation.prompts import choose_prompts
from paceline.distillation.texts import is_prompt_file, learned_prompts, read_texts
from paceline.errors import ConfigError
from paceline.store import TrainedOn, is_validation, part_of

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

EVERY = TrainedOn.of([])


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def decode(example: Example) -> str:
    return "".join(map(chr, example.tokens))


def read(
    *paths: Path,
    context: int = 100,
    max_tokens: int = 10**6,
    seed: int = 0,
    may_learn: Container[str] = EVERY,
) -> list[Example]:
    return read_texts(paths, encode, context, max_tokens, seed, may_learn)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def plain(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_token_but_a_texts_first_is_learned_once_with_weight_1(tmp_path: Path) -> None:
    """A cut that starts a new piece after the last one would leave out a token at each cut."""
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1200)))
    for context, longest in ((10, 10), (4096, 512)):
        examples = read(plain(tmp_path / "a.txt", text), context=context)
        assert max(len(e.tokens) for e in examples) == longest
        assert {e.domain for e in examples} == {"text"}
        assert len({e.id for e in examples}) == len(examples)
        learned = ""
        for example in examples:
            for prompt_weight in (0.0, 0.2):
                batch = collate([example], prompt_weight)
                assert batch.weights.tolist() == [1.0] * (len(example.tokens) - 1)
            learned += "".join(map(chr, batch.targets))
            assert example.num_output == len(batch.targets)
        assert learned == text[1:]


def test_kinds_of_files_give_the_same_texts(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "more": i} for i in range(6)]
    expected = {decode(e) for e in read(lines(tmp_path / "a.jsonl", rows))}
    assert expected == {row["text"] for row in rows}
    assert {decode(e) for e in read(table(tmp_path / "a.parquet", rows))} == expected
    single = [plain(tmp_path / f"{i}.txt", row["text"]) for i, row in enumerate(rows)]
    assert {decode(e) for e in read(*single)} == expected
    # equal texts of all files are read once
    assert len(read(*single, tmp_path / "a.jsonl", tmp_path / "a.parquet")) == 6


def test_the_order_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(40)])
    second = lines(tmp_path / "b.jsonl", [{"text": f"other {i}"} for i in range(40)])
    order = [e.id for e in read(first, second)]
    assert [e.id for e in read(second, first)] == order
    assert [e.id for e in read(first, second, seed=1)] != order
    assert sorted(e.id for e in read(first, second, seed=1)) == sorted(order)


@pytest.mark.parametrize("cap", [1, 9, 100, 333])
def test_a_cap_is_kept_exactly_and_a_larger_one_adds_texts(tmp_path: Path, cap: int) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": f"text {i} " * (i + 1)} for i in range(30)])
    capped, every = read(path, max_tokens=cap, context=20), read(path, context=20)
    assert sum(len(e.tokens) - 1 for e in capped) == cap
    assert [e.id for e in every][: len(capped)] == [e.id for e in capped]
    for few, whole in zip(capped, every, strict=False):
        assert np.array_equal(few.tokens, whole.tokens[: len(few.tokens)])


def prompt_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"p/{i}", "domain": "d", "prompt": f"prompt {i}", "reference": f"answer {i}"}
        for i in range(count)
    ]


@pytest.mark.parametrize("write", [lines, table])
def test_of_prompt_files_only_what_may_be_trained_on_is_learned(tmp_path: Path, write: Any) -> None:
    """References of prompts that are judged, collected or validated on would be learned by heart."""
    rows = prompt_rows(400)
    path = write(tmp_path / ("p.jsonl" if write is lines else "p.parquet"), rows)
    data = lines(tmp_path / "data.jsonl", [{"id": "x", "prompt": "other"}])
    settings = DistillSettings(pretrain_text=(path,), validation_share=0.1)
    may_learn = choose_prompts([data], settings).may_learn

    allowed = [
        row
        for row in rows
        if part_of(row["id"]) == "training" and not is_validation(row["id"], 0.1)
    ]
    assert 250 < len(allowed) < 350
    found = read(path, may_learn=may_learn)
    assert {decode(e) for e in found} == {f"{r['prompt']}\n{r['reference']}" for r in allowed}
    assert set(learned_prompts([path], may_learn)) == {row["prompt"] for row in allowed}


def test_a_text_that_another_file_judges_or_validates_on_is_not_learned(tmp_path: Path) -> None:
    ids = [f"q/{i}" for i in range(300)]
    judged = next(id for id in ids if part_of(id) == "judging")
    held = next(id for id in ids if part_of(id) == "training" and is_validation(id, 0.1))
    texts = {judged: "prompt 1", held: "prompt 2"}
    data = lines(tmp_path / "d.jsonl", [{"id": i, "prompt": t} for i, t in texts.items()])
    rows = [row | {"id": f"free/{i}"} for i, row in enumerate(prompt_rows(60))]
    path = lines(tmp_path / "p.jsonl", rows)

    settings = DistillSettings(pretrain_text=(path,), validation_share=0.1)
    without = set(learned_prompts([path], choose_prompts([path], settings).may_learn))
    assert {"prompt 1", "prompt 2"} <= without, "choose other ids"
    found = set(learned_prompts([path], choose_prompts([data], settings).may_learn))
    assert found == without - {"prompt 1", "prompt 2"}


def test_the_kind_of_a_file(tmp_path: Path) -> None:
    assert is_prompt_file(lines(tmp_path / "a.jsonl", prompt_rows(1)))
    assert not is_prompt_file(lines(tmp_path / "b.jsonl", [{"text": "x", "prompt": "y"}]))
    assert not is_prompt_file(plain(tmp_path / "c.txt", "x"))
    assert learned_prompts([tmp_path / "b.jsonl", tmp_path / "c.txt"], EVERY) == []


def test_files_that_cannot_be_used_are_named_with_the_reason(tmp_path: Path) -> None:
    good = {"text": "x"}
    for path, message in (
        (tmp_path / "none.txt", "none.txt: no such file of text"),
        (tmp_path / "none.jsonl", "none.jsonl: no such file of text"),
        (tmp_path / "none.parquet", "none.parquet: no such file of text"),
        (plain(tmp_path / "a.md", "x"), r"a.md: .* ends in .txt, .jsonl, .parquet"),
        (plain(tmp_path / "empty.txt", " \n"), "empty.txt: has no text"),
        (plain(tmp_path / "empty.jsonl", ""), "empty.jsonl: has no text"),
        (
            table(tmp_path / "b.parquet", [{"body": "x"}]),
            r"b.parquet: has the columns body; it needs",
        ),
        (lines(tmp_path / "c.jsonl", [good, {"prompt": "x"}]), "c.jsonl:2: a row without text"),
        (
            lines(tmp_path / "d.jsonl", [good, {"text": 5}]),
            r"d.jsonl:2: 'text' is not a text \(int",
        ),
        (plain(tmp_path / "e.jsonl", '{"text": "x"}\n{"te'), "e.jsonl:2: not a JSON object"),
        (plain(tmp_path / "s.jsonl", r'{"text": "\ud800"}'), "'text' holds half of a surrogate"),
        (plain(tmp_path / "one.txt", "x"), "no text of pretrain_text has two tokens"),
        (plain(tmp_path / "f.parquet", "no table"), "f.parquet: cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(path)
    (tmp_path / "g.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"g.txt: not UTF-8"):
        read(tmp_path / "g.txt")
    with pytest.raises(ConfigError, match="none of the texts"):
        read(lines(tmp_path / "h.jsonl", prompt_rows(3)), may_learn=EVERY)
