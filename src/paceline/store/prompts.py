"""Prompt files: one JSON object a line with `id`, `domain` and `prompt`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.contracts import PromptRecord
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def read_prompts(paths: Iterable[Path | str]) -> list[PromptRecord]:
    """Prompts from JSONL files with `id`, `domain` and `prompt`; ids must be unique."""
    records: list[PromptRecord] = []
    seen: set[str] = set()
    for path in paths:
        try:
            # not splitlines(): JSON strings may hold other Unicode line ends
            lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        for number, line in enumerate(lines, start=1):
            record = _parse(line, f"{path}:{number}")
            if record.id in seen:
                raise ConfigError(f"{path}:{number}: id '{record.id}' occurs twice")
            seen.add(record.id)
            records.append(record)
    return records


def _parse(line: str, where: str) -> PromptRecord:
    try:
        raw = json.loads(line)
        record = PromptRecord(str(raw["id"]), str(raw.get("domain", "")), str(raw["prompt"]))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: not a JSON object ({error})") from error
    except KeyError as error:
        raise ConfigError(f"{where}: key {error} is missing") from error
    if not record.prompt:
        raise ConfigError(f"{where}: the prompt is empty")
    return record


def is_validation(id: str, share: float) -> bool:
    """Whether an id belongs to the validation part: by hash, so no order of lines matters."""
    digest = hashlib.sha256(id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def take_by_hash(prompts: Sequence[PromptRecord], limit: int | None) -> list[PromptRecord]:
    """At most `limit` prompts, those whose ids have the lowest hashes: no order of lines matters."""
    return sorted(prompts, key=lambda r: hashlib.sha256(r.id.encode()).digest())[:limit]
