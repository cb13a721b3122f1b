"""A collection: what is known of prompts, kept so that it never has to be decoded again.

One shard store each for trajectories, features, every arm's replays and every arm's own outputs:
an arm or a feature version can be added later, and each is finished or resumed on its own. Rows
meet by id. Knows neither models nor costs. Symbols: T output tokens, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa

from paceline.contracts import NONE, CollectedPrompt, ReplayedDrafter
from paceline.errors import StoreError
from paceline.store.shards import ShardStore

if TYPE_CHECKING:
    from collections.abc import Sequence

_TRAJECTORIES: Final = "trajectories"
_FEATURES: Final = "features"
_REPLAYS: Final = "replays"
_OUTPUTS: Final = "outputs"
_TOKENS: Final = pa.list_(pa.int32())
_SCHEMAS: Final = {
    _TRAJECTORIES: pa.schema(
        [
            ("id", pa.string()),
            ("domain", pa.string()),
            ("prompt_tokens", _TOKENS),
            ("output_tokens", _TOKENS),
            ("finish_reason", pa.string()),
            ("max_new_tokens", pa.int32()),
            ("temperature", pa.float32()),
        ]
    ),
    _FEATURES: pa.schema([("id", pa.string()), ("features", pa.list_(pa.float32()))]),
    _REPLAYS: pa.schema(
        [
            ("id", pa.string()),
            ("everywhere", pa.bool_()),
            ("drafted", pa.list_(pa.int16())),  # [T - 1] everywhere, else [rounds]
            ("accepted", pa.list_(pa.int16())),
            ("match", pa.list_(pa.bool_())),  # [T], empty for arms without scores, as below
            ("ratio", pa.list_(pa.float32())),
            ("overlap", pa.list_(pa.float32())),
            ("confidence", pa.list_(pa.float32())),
        ]
    ),
    _OUTPUTS: pa.schema([("id", pa.string()), ("output_tokens", _TOKENS)]),
}


class CollectionIdentity(NamedTuple):
    """What a collection was made with; `arms` maps each arm, `none` first, to its identity line."""

    target: str
    tokenizer: str
    hidden_size: int
    feature_version: int
    arms: dict[str, str]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One prompt and what the target wrote, as it is kept."""

    id: str
    domain: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    finish_reason: str
    max_new_tokens: int
    temperature: float


class LoadedCollection(NamedTuple):
    """Prompts, by id, and what they were collected with."""

    prompts: list[CollectedPrompt]
    identity: CollectionIdentity


class Collection:
    """The stores of one folder, opened for writing with one target and its tokenizer.

    Each raises StoreError if the folder holds rows that were made with something else.
    """

    def __init__(self, folder: Path, target: str, tokenizer: str, none: str) -> None:
        """target: the model's fingerprint; tokenizer: hash of its token-to-id map; none: the line
        of that arm, which decoded the trajectories.
        """
        self.folder = Path(folder)
        self._target = target
        # the first store to be opened, because it claims the folder for this target
        self.trajectories = self._open(_TRAJECTORIES, "", {"tokenizer": tokenizer})
        if self.trajectories.facts.get(NONE) != none:
            self.trajectories.record(**{NONE: none})

    def features(self, version: int, hidden_size: int) -> ShardStore:
        made_with = {"feature_version": version, "hidden_size": hidden_size}
        return self._open(_FEATURES, "", made_with)

    def replays(self, arm: str, identity: str) -> ShardStore:
        """identity: the arm's line from `contracts.identity_of_arms`."""
        return self._open(_REPLAYS, arm, {"arm": identity})

    def outputs(self, arm: str, identity: str) -> ShardStore:
        """The drafter's own greedy outputs; empty where the prompt is too long for it."""
        return self._open(_OUTPUTS, arm, {"arm": identity})

    def _open(self, kind: str, arm: str, made_with: dict[str, Any]) -> ShardStore:
        folder = _folder(self.folder, kind, arm)
        remedy = "collect into a new folder"
        if kind != _TRAJECTORIES:
            remedy = f"delete {folder} and run `paceline collect` again"
        identity = {"target": self._target, **made_with}
        return ShardStore(folder, kind, _SCHEMAS[kind], identity, remedy)


def _folder(collection: Path, kind: str, arm: str) -> Path:
    # an arm may be called anything, a folder not
    return collection / kind / quote(arm, safe="").replace(".", "%2E")


def load_collection(folder: Path, arms: Sequence[str] | None = None) -> LoadedCollection:
    """The whole of a collection, with the replays of `arms` (None: of every arm it has).

    `none` is always among the rounds. Raises StoreError if the collection is empty, unfinished,
    damaged, of another format, or without one of the arms.
    """
    folder = Path(folder)
    if not (folder / _TRAJECTORIES).is_dir():
        raise StoreError(f"{folder}: no collection here; run `paceline collect`")
    store = _open_existing(folder, _TRAJECTORIES, "")
    if store.num_rows == 0:
        raise StoreError(f"{folder}: the collection is empty; run `paceline collect`")
    rows = _read(store)
    target = str(store.identity["target"])
    features, made_with = _read_beside(folder, _FEATURES, "", target, rows["id"])
    hidden_size, version = int(made_with["hidden_size"]), int(made_with["feature_version"])
    if arms is None:
        arms = sorted(unquote(path.name) for path in folder.glob(f"{_REPLAYS}/*"))
    replays, scores, lines = _read_replays(folder, arms, target, rows)
    outputs = _read_outputs(folder, list(lines))
    prompts = [
        CollectedPrompt(
            id=id,
            domain=rows["domain"][i],
            prompt_tokens=tuple(rows["prompt_tokens"][i].tolist()),
            output_tokens=tuple(rows["output_tokens"][i].tolist()),
            max_new_tokens=rows["max_new_tokens"][i],
            features=features["features"][i],
            replays={arm: of_arm[i] for arm, of_arm in replays.items()},
            draft_outputs={arm: by_id[id] for arm, by_id in outputs.items() if id in by_id},
            scores={arm: of_arm[i] for arm, of_arm in scores.items()},
        )
        for i, id in enumerate(rows["id"])
    ]
    # by id, so that nothing learned depends on the order of collecting
    prompts.sort(key=lambda prompt: prompt.id)
    tokenizer = str(store.identity["tokenizer"])
    lines = {NONE: str(store.facts.get(NONE, "")), **lines}
    return LoadedCollection(
        prompts, CollectionIdentity(target, tokenizer, hidden_size, version, lines)
    )


def read_trajectories(store: ShardStore) -> list[Trajectory]:
    """The rows of `Collection.trajectories`, in the order in which they were written."""
    columns = _read(store)
    for name in ("prompt_tokens", "output_tokens"):
        columns[name] = [tuple(tokens.tolist()) for tokens in columns[name]]
    return [Trajectory(*row) for row in zip(*columns.values(), strict=True)]


def open_trajectories(folder: Path) -> ShardStore:
    """The trajectories of an existing collection, for `read_trajectories`, whatever made them."""
    return _open_existing(Path(folder), _TRAJECTORIES, "")


def _open_existing(folder: Path, kind: str, arm: str) -> ShardStore:
    return ShardStore.open(_folder(folder, kind, arm), kind, _SCHEMAS[kind])


def _read_beside(
    folder: Path, kind: str, arm: str, target: str, ids: Sequence[str]
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """(columns in the order of `ids`, identity) of a store that must cover all of the ids."""
    where = _folder(folder, kind, arm)
    if not where.is_dir():
        what = f"arm '{arm}' is not in this collection" if arm else f"there are no {kind} yet"
        raise StoreError(f"{folder}: {what}; run `paceline collect` again to add it")
    store = _open_existing(folder, kind, arm)
    if store.identity.get("target") != target:
        raise StoreError(
            f"{where}: was made with target {store.identity.get('target')!r}, the trajectories "
            f"with {target!r}; delete it and run `paceline collect` again"
        )
    columns = _read(store)
    place = {id: i for i, id in enumerate(columns["id"])}
    num_there = sum(id in place for id in ids)
    if num_there < len(ids):
        raise StoreError(
            f"{where}: covers {num_there} of {len(ids)} prompts; run `paceline collect` again to "
            "finish it"
        )
    order = [place[id] for id in ids]
    return {name: [column[i] for i in order] for name, column in columns.items()}, store.identity


def _read_replays(
    folder: Path, arms: Sequence[str], target: str, rows: dict[str, list[Any]]
) -> tuple[
    dict[str, list[ReplayedDrafter]],
    dict[str, list[tuple[np.ndarray, np.ndarray]]],
    dict[str, str],
]:
    """(drafter -> replay of every prompt, drafter -> match and confidence of every prompt, drafter ->
    identity line); `none` needs no replay.
    """
    found: dict[str, list[ReplayedDrafter]] = {}
    scores: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    lines: dict[str, str] = {}
    for arm in arms:
        if arm == NONE:
            continue
        replays, made_with = _read_beside(folder, _REPLAYS, arm, target, rows["id"])
        columns = (replays["drafted"], replays["accepted"], replays["everywhere"])
        found[arm] = [
            ReplayedDrafter(np.stack((drafted, accepted), axis=1), everywhere)
            for drafted, accepted, everywhere in zip(*columns, strict=True)
        ]
        _check_fit(_folder(folder, _REPLAYS, arm), found[arm], rows)
        scores[arm] = list(zip(replays["match"], replays["confidence"], strict=True))
        lines[arm] = str(made_with["arm"])
    return found, scores, lines


def _check_fit(where: Path, replays: Sequence[ReplayedDrafter], rows: dict[str, list[Any]]) -> None:
    """A replay is of its trajectory: an entry a position, or rounds that emit it token by token. A
    round emits its accepted tokens and one more, except a last one that ends the answer.
    """
    for id, of_prompt, output in zip(rows["id"], replays, rows["output_tokens"], strict=True):
        table = of_prompt.table
        emitted = 1 + len(table)
        if not of_prompt.everywhere:
            emitted += int(table[:, 1].sum())
        slack = 0 if of_prompt.everywhere or not len(table) else 1
        if not 0 <= emitted - len(output) <= slack:
            raise StoreError(
                f"{where}: the replay of '{id}' is not of the trajectory collected here; delete it "
                "and run `paceline collect` again"
            )


def _read_outputs(folder: Path, arms: Sequence[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    outputs: dict[str, dict[str, tuple[int, ...]]] = {}
    for arm in arms:
        if _folder(folder, _OUTPUTS, arm).is_dir():
            columns = _read(_open_existing(folder, _OUTPUTS, arm))
            pairs = zip(columns["id"], columns["output_tokens"], strict=True)
            outputs[arm] = {id: tuple(tokens.tolist()) for id, tokens in pairs}
    return outputs


def _read(store: ShardStore) -> dict[str, list[Any]]:
    """Columns in the schema's order, each a list over rows; a list in a row becomes an array."""
    table = store.read()
    columns = zip(table.schema, table.columns, strict=True)
    return {
        field.name: _arrays(column) if pa.types.is_list(field.type) else column.to_pylist()
        for field, column in columns
    }


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of lists as one array a row; Python objects for each value would be slow."""
    lists = column.combine_chunks()
    values = lists.values.to_numpy(zero_copy_only=False)
    offsets = lists.offsets.to_numpy()
    return [values[a:b] for a, b in pairwise(offsets)]
