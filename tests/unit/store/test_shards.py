"""Shards survive a kill at any moment, and every fault of a store is reported in one line."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from paceline.errors import StoreError
from paceline.files import write_atomically
from paceline.store import ShardStore

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = pa.schema([("id", pa.string()), ("tokens", pa.list_(pa.int32()))])
IDENTITY = {"target": "aaaa"}


def open_store(folder: Path, **changes: Any) -> ShardStore:
    given = {"kind": "things", "schema": SCHEMA, "identity": IDENTITY, **changes}
    return ShardStore(folder, **given)


def rows(*ids: str) -> list[dict[str, Any]]:
    return [{"id": id, "tokens": [1, 2, len(id)] * 400} for id in ids]


def refused(folder: Path, match: str, **changes: Any) -> None:
    with pytest.raises(StoreError, match=match) as caught:
        open_store(folder, **changes).read()
    assert "\n" not in str(caught.value)


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(rows("b", "a"))
    store.append([])
    store.append(rows("c"))
    store.record_facts(command="collect")
    again = open_store(tmp_path)
    assert again.read().to_pylist() == rows("b", "a", "c")
    assert again.ids() == {"a", "b", "c"}
    assert again.num_rows == 3
    assert again.facts == {"command": "collect"}


def test_an_empty_store_reads_as_no_rows(tmp_path: Path) -> None:
    assert open_store(tmp_path).read().to_pylist() == []
    assert open_store(tmp_path).ids() == set()


def test_a_shard_without_its_manifest_was_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    store.append(rows("a"))
    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "_write_manifest", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.append(rows("b", "c"))
    assert (tmp_path / "shard-00001.parquet").exists()
    again = open_store(tmp_path)
    assert again.ids() == {"a"}
    again.append(rows("c"))
    assert again.read().to_pylist() == rows("a", "c")


def test_a_write_that_dies_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own error has no name, and a message without one helps nobody."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "file", b"new")
    assert caught.value.filename == str(tmp_path / "file")


def test_what_was_made_otherwise_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).append(rows("a"))
    refused(tmp_path, "target 'aaaa', now it is 'bbbb'; start over", identity={"target": "bbbb"},
            remedy="start over")  # fmt: skip
    refused(tmp_path, "holds 'things', not 'others'", kind="others")
    refused(tmp_path, "columns .* are expected", schema=pa.schema([("id", pa.string())]))


def test_another_format_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).append(rows("a"))
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 99}))
    refused(tmp_path, "store format 99, this version of paceline reads 1")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    open_store(tmp_path).append(rows("a"))
    (tmp_path / "manifest.json").write_text(text)
    refused(tmp_path, str(tmp_path))


def test_a_manifest_without_its_lists_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).append(rows("a"))
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["shards"]
    path.write_text(json.dumps(manifest))
    refused(tmp_path, "damaged manifest; delete")


def test_a_damaged_shard_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(rows("a", "b"))
    path = tmp_path / "shard-00000.parquet"
    good = path.read_bytes()
    for damaged in (b"", good[:-9], good[: len(good) // 2], b"x" * len(good)):
        path.write_bytes(damaged)
        refused(tmp_path, rf"{path.name}: damaged \(.*delete {tmp_path} and collect again")
    path.unlink()
    refused(tmp_path, "damaged")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Parquet itself ignores most flipped bits."""
    open_store(tmp_path).append(rows("a", "b"))
    path = tmp_path / "shard-00000.parquet"
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        refused(tmp_path, "damaged")


def test_a_shard_of_another_length_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(rows("a", "b"))
    store.append(rows("c"))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"rows": 2', '"rows": 3'))
    refused(tmp_path, "2 rows where the manifest says 3; delete")


def test_opening_what_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"no collection here; run `paceline collect PROMPTS` first"
    ):
        ShardStore.open(tmp_path / "nothing", "things", SCHEMA)
    assert not (tmp_path / "nothing").exists()
