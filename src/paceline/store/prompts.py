"""Prompts from files: JSON lines, Parquet, or a folder that `datasets.save_to_disk` wrote.

Every row becomes a `PromptRecord`; a message on a broken row names its file and number. Knows no
tokenizer and no network: a dataset on a hub is saved to a folder first.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from paceline.contracts import PromptRecord
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Rows = Iterator[tuple[str, Any]]  # place, row or the reason why it cannot be read

_STATE: Final = "state.json"  # of a saved dataset
_SPLITS: Final = "dataset_dict.json"  # of several, each in its own folder next to this file


@dataclass(frozen=True, slots=True)
class PromptFields:
    """The names of the columns. A row without an id gets a hash of its prompt as id."""

    prompt: str = "prompt"
    id: str = "id"
    domain: str = "domain"


class _BadRowError(ValueError):
    """The reason why a row is not a prompt."""


def read_prompts(
    paths: Iterable[Path | str] | Path | str,
    fields: PromptFields = PromptFields(),
    on_bad: Callable[[str], None] | None = None,
) -> list[PromptRecord]:
    """Return prompts of JSONL files, Parquet files and saved datasets (`folder`, or `folder:split`).

    A prompt is a string, or a list with one message of the role `user`. Ids must be unique; a repeated
    prompt without an id is taken once. on_bad: called with the message on each broken row, which is
    then left out.

    Raises ConfigError on a file that cannot be read, and without `on_bad` on a broken row.
    """
    records: dict[str, PromptRecord] = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        for where, raw in _read_rows(str(path), fields):
            try:
                record, has_id = _parse_record(raw, fields)
                if has_id and record.id in records:
                    raise _BadRowError(f"id '{record.id}' occurs twice")
            except _BadRowError as error:
                if on_bad is None:
                    raise ConfigError(f"{where}: {error}") from error
                on_bad(f"{where}: {error}")
                continue
            records.setdefault(record.id, record)
    return list(records.values())


def _parse_record(raw: Any, fields: PromptFields) -> tuple[PromptRecord, bool]:
    """Return (record, whether the row has an id)."""
    if isinstance(raw, _BadRowError):
        raise raw
    if not isinstance(raw, dict):
        raise _BadRowError(f"not a JSON object ({type(raw).__name__})")
    if fields.prompt not in raw:
        raise _BadRowError(f"key '{fields.prompt}' is missing")
    prompt = _parse_prompt(raw[fields.prompt])
    id, domain = raw.get(fields.id), raw.get(fields.domain)
    name = hashlib.sha256(prompt.encode()).hexdigest()[:16] if id is None else str(id)
    task = "" if domain is None else str(domain)
    _check_characters("id", name)
    _check_characters("domain", task)
    return PromptRecord(name, task, prompt), id is not None


def _parse_prompt(value: Any) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "user":
            raise _BadRowError("a prompt of messages must be one message of the role 'user'")
        value = value[0].get("content")
    if not isinstance(value, str):
        raise _BadRowError(f"the prompt is not a text ({type(value).__name__})")
    if not value:
        raise _BadRowError("the prompt is empty")
    _check_characters("prompt", value)
    return value


def _check_characters(name: str, value: str) -> None:
    """Raise _BadRowError for a text that no file can hold; JSON can spell it."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError(f"the {name} holds half of a surrogate pair") from error


# --- kinds of files -------------------------------------------------------------------------------


def _read_rows(path: str, fields: PromptFields) -> Rows:
    folder, _, split = path.rpartition(":")
    try:
        if Path(path).is_dir():
            yield from _read_dataset(Path(path), "", fields)
        elif folder and Path(folder).is_dir():
            yield from _read_dataset(Path(folder), split, fields)
        elif not Path(path).exists():
            raise ConfigError(
                f"{path}: no such file or folder; save a dataset of a hub with `save_to_disk` and "
                "give that folder"
            )
        elif path.endswith(".parquet"):
            yield from _read_parquet(path, fields)
        else:
            yield from read_json_lines(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def read_json_lines(path: Path | str) -> Rows:
    """Yield (FILE:LINE, value) per line; the value is a ValueError where the line is not JSON."""
    # not splitlines(): JSON strings may hold other line ends
    content = Path(path).read_bytes().rstrip(b"\n")
    for number, line in enumerate(content.split(b"\n") if content else (), start=1):
        try:
            raw = json.loads(line.decode())
        except ValueError as error:
            raw = _BadRowError(f"not a JSON object ({error})")
        yield f"{path}:{number}", raw


def _read_parquet(path: str, fields: PromptFields) -> Rows:
    with pq.ParquetFile(path) as file:
        columns = _select_columns(path, file.schema_arrow, fields)
        yield from _number_rows(path, file.iter_batches(columns=columns))


def _read_dataset(folder: Path, split: str, fields: PromptFields) -> Rows:
    """Yield the rows of a saved dataset: `state.json` lists its files, which are Arrow streams."""
    folder, split = _find_split(folder, split)
    if split or not (folder / _STATE).is_file():
        what = f"has no split '{split}'" if split else f"no saved dataset, {_STATE} is missing"
        raise ConfigError(f"{folder}: {what}; give a file, or a folder that `save_to_disk` wrote")
    state = _read_json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise ConfigError(f"{folder}: saved with an index; call `flatten_indices` and save again")
    paths = (folder / entry["filename"] for entry in state["_data_files"])
    yield from _number_rows(str(folder), _read_streams(folder, paths, fields))


def _read_streams(
    folder: Path, paths: Iterable[Path], fields: PromptFields
) -> Iterator[pa.RecordBatch]:
    for path in paths:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            columns = _select_columns(str(folder), stream.schema, fields)
            for batch in stream:
                yield batch.select(columns)


def _find_split(folder: Path, split: str) -> tuple[Path, str]:
    """Return (the split's folder, ""), or the arguments where the folder has no splits."""
    if not (folder / _SPLITS).is_file():
        return folder, split
    splits = [str(name) for name in _read_json(folder / _SPLITS)["splits"]]
    if not split and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        raise ConfigError(
            f"{folder}: has the splits {', '.join(splits)}; name one, as in {folder}:{splits[0]}"
        )
    return folder / split, ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); save the dataset again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a JSON object; save the dataset again")
    return raw


def _select_columns(path: str, schema: pa.Schema, fields: PromptFields) -> list[str]:
    """Return the columns to read; others may be large."""
    if fields.prompt not in schema.names:
        raise ConfigError(
            f"{path}: no column '{fields.prompt}' for the prompts; there are: {', '.join(schema.names)}"
        )
    return [
        name
        for name in dict.fromkeys((fields.prompt, fields.id, fields.domain))
        if name in schema.names
    ]


def _number_rows(path: str, batches: Iterable[pa.RecordBatch]) -> Rows:
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row


# --- parts of a list of prompts -------------------------------------------------------------------


def take_by_hash(prompts: Sequence[PromptRecord], limit: int | None) -> list[PromptRecord]:
    """Return the `limit` prompts with the lowest hashes of ids: the order of lines is irrelevant."""
    return sorted(prompts, key=lambda r: hashlib.sha256(r.id.encode()).digest())[:limit]
