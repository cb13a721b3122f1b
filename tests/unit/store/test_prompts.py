"""Prompt files: every format gives the same records, and a message names a broken row's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paceline.contracts import PromptRecord
from paceline.errors import ConfigError
from paceline.store import PromptFields, read_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROWS = [
    {"id": "a", "domain": "math", "prompt": "one\u2028two", "other": 1},
    {"id": "b", "domain": "code", "prompt": "three", "other": 2},
    {"id": "c", "domain": "code", "prompt": "ünï", "other": 3},
]
RECORDS = [PromptRecord(str(r["id"]), str(r["domain"]), str(r["prompt"])) for r in ROWS]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def save_dataset(folder: Path, rows: Sequence[dict[str, Any]], num_shards: int = 2) -> Path:
    """Write the files of `Dataset.save_to_disk(folder, num_shards=...)` of the datasets package."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(list(rows))
    files = []
    for i in range(num_shards):
        name = f"data-{i:05d}-of-{num_shards:05d}.arrow"
        start, stop = i * len(rows) // num_shards, (i + 1) * len(rows) // num_shards
        part = table.slice(start, stop - start)
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(part)
        files.append({"filename": name})
    state = {"_data_files": files, "_fingerprint": "1", "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def save_splits(folder: Path, splits: dict[str, Sequence[dict[str, Any]]]) -> Path:
    for name, rows in splits.items():
        save_dataset(folder / name, rows, 1)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_jsonl, "p.jsonl"), (write_parquet, "p.parquet"), (save_dataset, "saved")],
)
def test_every_format_gives_the_same_records(
    tmp_path: Path, write: Callable[..., Path], name: str
) -> None:
    path = write(tmp_path / name, ROWS)

    assert read_prompts([path]) == RECORDS
    assert read_prompts([str(path)]) == RECORDS
    assert read_prompts(path) == read_prompts(str(path)) == RECORDS


def test_a_dataset_saved_by_the_datasets_package(tmp_path: Path) -> None:
    import datasets  # imported here, because it takes seconds

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    rows.select([2, 0]).save_to_disk(str(tmp_path / "picked"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(
        str(tmp_path / "both")
    )

    assert read_prompts([tmp_path / "one"]) == RECORDS
    assert read_prompts([tmp_path / "picked"]) == [RECORDS[2], RECORDS[0]]
    assert read_prompts([f"{tmp_path / 'both'}:test"]) == [RECORDS[1]]


def test_splits_are_named_unless_there_is_one(tmp_path: Path) -> None:
    both = save_splits(tmp_path / "both", {"train": ROWS[:2], "test": ROWS[2:]})
    only = save_splits(tmp_path / "only", {"train": ROWS})

    assert read_prompts([f"{both}:train", f"{both}:test"]) == RECORDS
    assert read_prompts([only]) == RECORDS
    for path in (str(both), f"{both}:dev"):
        with pytest.raises(ConfigError, match=r"splits train, test; name one, as in .*both:train"):
            read_prompts([path])
    with pytest.raises(ConfigError, match="has no split 'train'"):
        read_prompts([f"{save_dataset(tmp_path / 'plain', ROWS)}:train"])


def test_fields_may_have_other_names_and_may_be_missing(tmp_path: Path) -> None:
    rows = [{"question": "why?", "source": 7}, {"question": "how?", "source": None}]
    fields = PromptFields(prompt="question", id="key", domain="source")
    from_json = read_prompts([write_jsonl(tmp_path / "q.jsonl", rows)], fields)

    assert [(r.prompt, r.domain) for r in from_json] == [("why?", "7"), ("how?", "")]
    assert read_prompts([write_parquet(tmp_path / "q.parquet", rows)], fields) == from_json
    # the id depends only on the prompt, not on file, order or format
    again = read_prompts([write_jsonl(tmp_path / "r.jsonl", rows[::-1])], fields)
    assert {r.id: r.prompt for r in again} == {r.id: r.prompt for r in from_json}
    assert len({r.id for r in from_json}) == 2


def test_a_repeated_prompt_without_id_is_taken_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "x"}])

    assert [r.prompt for r in read_prompts([path])] == ["x", "y"]


def test_one_user_message_is_a_prompt(tmp_path: Path) -> None:
    rows = [{"id": 1, "messages": [{"role": "user", "content": "hi"}]}]
    fields = PromptFields(prompt="messages")

    for path in (
        write_jsonl(tmp_path / "m.jsonl", rows),
        write_parquet(tmp_path / "m.parquet", rows),
    ):
        assert read_prompts([path], fields) == [PromptRecord("1", "", "hi")]


BROKEN = {
    "{": "not a JSON object",
    '["prompt"]': "not a JSON object",
    '{"id": "x"}': "key 'prompt' is missing",
    '{"id": "x", "prompt": ""}': "the prompt is empty",
    '{"id": "x", "prompt": null}': "not a text",
    '{"id": "x", "prompt": 3}': "not a text",
    '{"id": "x", "prompt": "\\ud800"}': "surrogate",
    '{"id": "\\ud800", "prompt": "x"}': "the id holds half of a surrogate",
    '{"domain": "\\ud800", "prompt": "x"}': "the domain holds half of a surrogate",
    '{"id": "x", "prompt": [{"role": "assistant", "content": "hi"}]}': "role 'user'",
    '{"id": "a", "prompt": "again"}': "id 'a' occurs twice",
}


@pytest.mark.parametrize(("line", "message"), BROKEN.items())
def test_a_broken_line_is_named_by_its_place(tmp_path: Path, line: str, message: str) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [ROWS[0], ROWS[1], line, ROWS[2]])

    with pytest.raises(ConfigError, match=rf"p\.jsonl:3: .*{message}"):
        read_prompts([path])

    bad: list[str] = []
    assert read_prompts([path], on_bad=bad.append) == RECORDS
    assert len(bad) == 1
    assert f"{path}:3: " in bad[0] and message in bad[0]


def test_bytes_that_are_no_text_break_their_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": "a", "prompt": "x"}\r\n{"id": "\xff"}\r\n{"id": "b", "prompt": "y"}')

    bad: list[str] = []
    assert [r.id for r in read_prompts([path], on_bad=bad.append)] == ["a", "b"]
    assert len(bad) == 1 and f"{path}:2" in bad[0]


def test_broken_rows_of_tables_are_numbered_through_shards(tmp_path: Path) -> None:
    rows = [*ROWS, {"id": "d", "domain": "", "prompt": None, "other": 4}]
    for path in (save_dataset(tmp_path / "s", rows), write_parquet(tmp_path / "p.parquet", rows)):
        bad: list[str] = []
        assert read_prompts([path], on_bad=bad.append) == RECORDS
        assert len(bad) == 1 and bad[0].startswith(f"{path}:4: ")


def test_what_is_no_prompt_file_is_refused(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "p.parquet", [{"text": "x", "n": 1}])
    with pytest.raises(ConfigError, match="no column 'prompt' for the prompts; there are: text, n"):
        read_prompts([table])
    with pytest.raises(ConfigError, match="save_to_disk"):
        read_prompts(["someone/their-dataset"])
    (tmp_path / "torn.parquet").write_bytes(table.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"torn\.parquet: cannot be read"):
        read_prompts([tmp_path / "torn.parquet"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"state\.json is missing"):
        read_prompts([tmp_path / "empty"])
    saved = save_dataset(tmp_path / "saved", ROWS)
    (saved / "data-00001-of-00002.arrow").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts([saved])
