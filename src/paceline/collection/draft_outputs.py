"""Outputs that models outside this process wrote to the collected prompts.

A drafter behind an API, or one that is not there to be run: its texts alone are enough for the
`alignment` reward. A file holds one JSON object a line, `id` and either `output`, a text, or
`output_tokens`, ids of the target's vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from paceline.assembly import Pace
    from paceline.store import Collection, ShardStore

_SHOWN = 5  # missing ids that are named


@dataclass(frozen=True, slots=True)
class Written:
    """One writer's outputs to all prompts of a collection, checked and not yet kept."""

    path: Path
    tokens: dict[str, list[int]]  # prompt id -> output
    store: ShardStore

    def keep(self) -> int:
        """Add what is new to the collection; returns how many prompts had none yet."""
        there = self.store.ids()
        new = [{"id": id, "output_tokens": t} for id, t in self.tokens.items() if id not in there]
        self.store.append(new)
        if new:
            sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
            self.store.record(file=self.path.name, sha256=sha256)
        return len(new)


def check_outputs(
    pace: Pace, writer: str, path: Path, prompt_ids: Iterable[str], collection: Collection
) -> Written:
    """A file's outputs to these prompts; those to others are left out.

    Raises ConfigError with file and line on one that cannot be read, StoreError where the file lacks
    one of the prompts or says otherwise than the one before.
    """
    if writer in pace.drafters:
        raise ConfigError(
            f"--outputs {writer}={path}: '{writer}' is configured here, `--alignment` decodes it; give "
            "the outputs made elsewhere another name"
        )
    found = read_outputs(pace, path)
    wanted = list(dict.fromkeys(prompt_ids))
    missing = [id for id in wanted if id not in found]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise StoreError(
            f"{path}: no output to {', '.join(missing[:_SHOWN])}{more}; every collected prompt needs one"
        )
    store = collection.outputs(writer, "written elsewhere")
    there = {row["id"]: row["output_tokens"] for row in store.read().to_pylist()}
    changed = next((id for id in wanted if there.get(id, found[id]) != found[id]), None)
    if changed is not None:
        raise StoreError(
            f"{path}: another output to '{changed}' than the one kept as '{writer}'; give the new ones "
            f"another name, or delete {store.folder}"
        )
    return Written(path, {id: found[id] for id in wanted}, store)


def read_outputs(pace: Pace, path: Path) -> dict[str, list[int]]:
    """id -> tokens. Raises ConfigError with the line on one that is not of the form."""
    try:
        # not splitlines(): JSON strings may hold other Unicode line ends
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    found: dict[str, list[int]] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            raw = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not a JSON object ({error})") from error
        if not isinstance(raw, dict) or "id" not in raw:
            raise ConfigError(f"{where}: not a JSON object with 'id'")
        if str(raw["id"]) in found:
            raise ConfigError(f"{where}: id '{raw['id']}' occurs twice")
        found[str(raw["id"])] = _tokens(pace, raw, where)
    return found


def _tokens(pace: Pace, raw: dict[str, Any], where: str) -> list[int]:
    if isinstance(raw.get("output"), str):
        ids: list[int] = pace.parts.tokenizer(raw["output"], add_special_tokens=False)["input_ids"]
        return ids
    given = raw.get("output_tokens")
    if not isinstance(given, list) or not all(type(token) is int for token in given):
        raise ConfigError(f"{where}: needs 'output', a text, or 'output_tokens', a list of ids")
    outside = [t for t in given if not 0 <= t < pace.parts.vocabulary.num_tokens]
    if outside:
        raise ConfigError(f"{where}: {outside[0]} is no token id of the target's vocabulary")
    return given
