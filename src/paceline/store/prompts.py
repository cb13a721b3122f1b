"""Prompts from files: JSON lines, Parquet, or a folder that `datasets.save_to_disk` wrote.

Every row becomes a `PromptRecord`; what is broken is named by file and row. Knows no tokenizer and
no network: a dataset on a hub is saved to a folder first.
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

    Rows = Iterator[tuple[str, Any]]  # where it stands, the row or why it could not be read

_STATE: Final = "state.json"  # of a dataset saved to disk
_SPLITS: Final = "dataset_dict.json"  # of several, in folders beside it


@dataclass(frozen=True, slots=True)
class PromptFields:
    """What the columns are called. A row without an id is known by a hash of its prompt."""

    prompt: str = "prompt"
    id: str = "id"
    domain: str = "domain"


class _BadRowError(ValueError):
    """Why a row is no prompt."""


def read_prompts(
    paths: Iterable[Path | str] | Path | str,
    fields: PromptFields = PromptFields(),
    on_bad: Callable[[str], None] | None = None,
) -> list[PromptRecord]:
    """Prompts of one or more JSONL files, Parquet files, saved datasets (`folder`, or `folder:split`).

    A prompt is a string, or a list with one message of the role `user`. Ids must be unique; a prompt
    without an id that occurs again is taken once. A broken row raises ConfigError with its place;
    with `on_bad`, it is left out and its message is handed there.
    """
    records: dict[str, PromptRecord] = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        for where, raw in _rows(str(path), fields):
            try:
                record, is_named = _record(raw, fields)
                if is_named and record.id in records:
                    raise _BadRowError(f"id '{record.id}' occurs twice")
            except _BadRowError as error:
                if on_bad is None:
                    raise ConfigError(f"{where}: {error}") from error
                on_bad(f"{where}: {error}")
                continue
            records.setdefault(record.id, record)
    return list(records.values())


def _record(raw: Any, fields: PromptFields) -> tuple[PromptRecord, bool]:
    """(record, whether it brought its own id)."""
    if isinstance(raw, _BadRowError):
        raise raw
    if not isinstance(raw, dict):
        raise _BadRowError(f"not a JSON object ({type(raw).__name__})")
    if fields.prompt not in raw:
        raise _BadRowError(f"key '{fields.prompt}' is missing")
    prompt = _prompt_text(raw[fields.prompt])
    id, domain = raw.get(fields.id), raw.get(fields.domain)
    name = hashlib.sha256(prompt.encode()).hexdigest()[:16] if id is None else str(id)
    return PromptRecord(name, "" if domain is None else str(domain), prompt), id is not None


def _prompt_text(value: Any) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "user":
            raise _BadRowError("a prompt of messages must be one message of the role 'user'")
        value = value[0].get("content")
    if not isinstance(value, str):
        raise _BadRowError(f"the prompt is not a text ({type(value).__name__})")
    if not value:
        raise _BadRowError("the prompt is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError(
            "the prompt holds half of a surrogate pair, which no text has"
        ) from error
    return value


# --- kinds of files -------------------------------------------------------------------------------


def _rows(path: str, fields: PromptFields) -> Rows:
    folder, _, split = path.rpartition(":")
    try:
        if Path(path).is_dir():
            yield from _dataset_rows(Path(path), "", fields)
        elif folder and Path(folder).is_dir():
            yield from _dataset_rows(Path(folder), split, fields)
        elif not Path(path).exists():
            raise ConfigError(
                f"{path}: no such file or folder; a dataset of a hub is read from a folder that "
                "its `save_to_disk` wrote"
            )
        elif path.endswith(".parquet"):
            yield from _parquet_rows(path, fields)
        else:
            yield from _json_rows(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def _json_rows(path: str) -> Rows:
    # not splitlines(): JSON strings may hold other line ends
    lines = Path(path).read_bytes().rstrip(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            raw = json.loads(line.decode())
        except ValueError as error:
            raw = _BadRowError(f"not a JSON object ({error})")
        yield f"{path}:{number}", raw


def _parquet_rows(path: str, fields: PromptFields) -> Rows:
    with pq.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow, fields)
        yield from _numbered(path, file.iter_batches(columns=columns))


def _dataset_rows(folder: Path, split: str, fields: PromptFields) -> Rows:
    """A saved dataset: `state.json` lists its files, which are Arrow streams."""
    if (folder / _SPLITS).is_file():
        splits = [str(name) for name in _json(folder / _SPLITS)["splits"]]
        if not split and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise ConfigError(
                f"{folder}: holds the splits {', '.join(splits)}; name one, as in "
                f"{folder}:{splits[0]}"
            )
        folder, split = folder / split, ""
    if split or not (folder / _STATE).is_file():
        what = f"has no split '{split}'" if split else f"no saved dataset, {_STATE} is missing"
        raise ConfigError(f"{folder}: {what}; give a file, or what `save_to_disk` wrote")
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise ConfigError(f"{folder}: saved with an index beside the rows; flatten and save again")
    first = 0
    for entry in state["_data_files"]:
        with (
            pa.memory_map(str(folder / entry["filename"])) as source,
            pa.ipc.open_stream(source) as stream,
        ):
            columns = _columns(str(folder), stream.schema, fields)
            batches = (batch.select(columns) for batch in stream)
            for where, row in _numbered(str(folder), batches, first):
                first += 1
                yield where, row


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected an object; save the dataset again")
    return raw


def _columns(path: str, schema: pa.Schema, fields: PromptFields) -> list[str]:
    """The columns to read; others may be large."""
    if fields.prompt not in schema.names:
        raise ConfigError(
            f"{path}: there is no column '{fields.prompt}' for the prompts; there are: "
            f"{', '.join(schema.names)}"
        )
    return [
        name
        for name in dict.fromkeys((fields.prompt, fields.id, fields.domain))
        if name in schema.names
    ]


def _numbered(path: str, batches: Iterable[pa.RecordBatch], first: int = 0) -> Rows:
    number = first
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", row


# --- parts of a list of prompts -------------------------------------------------------------------


def is_validation(id: str, share: float) -> bool:
    """Whether an id belongs to the validation part: by hash, so no order of lines matters."""
    digest = hashlib.sha256(id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def take_by_hash(prompts: Sequence[PromptRecord], limit: int | None) -> list[PromptRecord]:
    """At most `limit` prompts, those whose ids have the lowest hashes: no order of lines matters."""
    return sorted(prompts, key=lambda r: hashlib.sha256(r.id.encode()).digest())[:limit]
