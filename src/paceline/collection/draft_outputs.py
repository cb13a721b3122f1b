"""Outputs to the collected prompts that models outside this process wrote.

Such a model is behind an API or not available here; its texts are enough for the `alignment` reward.
A file holds one JSON object per line: `id` and either `output`, a text, or `output_tokens`, ids of the
target's vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.contracts import TEXT_ONLY
from paceline.errors import ConfigError, StoreError
from paceline.store.prompts import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from paceline.assembly import Pace
    from paceline.store import Collection, ShardStore

_MAX_SHOWN = 5  # missing ids in a message


@dataclass(frozen=True, slots=True)
class DraftOutputs:
    """One writer's outputs to all prompts of a collection, checked and not yet stored."""

    path: Path
    tokens: dict[str, list[int]]  # prompt id -> output
    store: ShardStore

    def save(self) -> int:
        """Add the new outputs to the collection; return their number."""
        stored = self.store.ids()
        new = [{"id": id, "output_tokens": t} for id, t in self.tokens.items() if id not in stored]
        self.store.append(new)
        if new:
            sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
            self.store.record_facts(file=self.path.name, sha256=sha256)
        return len(new)


def load_outputs(
    pace: Pace, writer: str, path: Path, prompt_ids: Iterable[str], collection: Collection
) -> DraftOutputs:
    """Load a file's outputs to these prompts; outputs to other prompts are ignored.

    Raises ConfigError with file and line on an output that cannot be read, StoreError if the file lacks
    a prompt or differs from outputs that are stored already.
    """
    if writer in pace.drafters:
        raise ConfigError(
            f"--outputs {writer}={path}: '{writer}' is configured here, `--alignment` decodes it; give "
            "the outputs made elsewhere another name"
        )
    outputs = read_outputs(pace, path)
    wanted = list(dict.fromkeys(prompt_ids))
    missing = [id for id in wanted if id not in outputs]
    if missing:
        more = f" and {len(missing) - _MAX_SHOWN} more" if len(missing) > _MAX_SHOWN else ""
        raise StoreError(
            f"{path}: no output to {', '.join(missing[:_MAX_SHOWN])}{more}; every collected prompt "
            "needs one"
        )
    store = collection.outputs(writer, TEXT_ONLY)
    stored = {row["id"]: row["output_tokens"] for row in store.read().to_pylist()}
    changed = next((id for id in wanted if stored.get(id, outputs[id]) != outputs[id]), None)
    if changed is not None:
        raise StoreError(
            f"{path}: another output to '{changed}' than the one kept as '{writer}'; give the new ones "
            f"another name, or delete {store.folder}"
        )
    return DraftOutputs(path, {id: outputs[id] for id in wanted}, store)


def read_outputs(pace: Pace, path: Path) -> dict[str, list[int]]:
    """Return id -> tokens of a file. Raises ConfigError with the line that is not of the form."""
    outputs: dict[str, list[int]] = {}
    try:
        lines = list(read_json_lines(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    for where, raw in lines:
        if isinstance(raw, ValueError):
            raise ConfigError(f"{where}: {raw}")
        if not isinstance(raw, dict) or "id" not in raw:
            raise ConfigError(f"{where}: not a JSON object with 'id'")
        if str(raw["id"]) in outputs:
            raise ConfigError(f"{where}: id '{raw['id']}' occurs twice")
        outputs[str(raw["id"])] = _parse_tokens(pace, raw, where)
    return outputs


def _parse_tokens(pace: Pace, raw: dict[str, Any], where: str) -> list[int]:
    if isinstance(raw.get("output"), str):
        ids: list[int] = pace.parts.tokenizer(raw["output"], add_special_tokens=False)["input_ids"]
        return ids
    tokens = raw.get("output_tokens")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ConfigError(f"{where}: needs 'output', a text, or 'output_tokens', a list of ids")
    unknown = [t for t in tokens if not 0 <= t < pace.parts.vocabulary.num_tokens]
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]} is no token id of the target's vocabulary")
    return tokens
