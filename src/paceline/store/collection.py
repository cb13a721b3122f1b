"""A collection: what is known of prompts, kept so that it never has to be decoded again.

One shard store each for trajectories and for every encoder's features, every drafter's replays and
scores, every writer's outputs: each can be added later, and is finished or resumed on its own. Rows
meet by id. Knows neither models nor costs. Symbols: T output tokens, F features.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from paceline.config import DEFAULT_ENCODERS
from paceline.contracts import NONE, CollectedPrompt, ReplayedDrafter
from paceline.errors import StoreError
from paceline.store.layout import (
    FEATURES,
    OUTPUTS,
    REPLAYS,
    SCHEMAS,
    SCORES,
    TRAJECTORIES,
    Trajectory,
    folder_of,
    names_of,
)
from paceline.store.shards import ShardStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_HIDDEN_SIZE = "hidden_size"


class CollectionIdentity(NamedTuple):
    """What a collection was made with; `arms` maps each drafter, `none` first, to its identity line,
    `encoders` each encoder, in the order of the features, to its own.
    """

    target: str
    tokenizer: str
    hidden_size: int
    arms: dict[str, str]
    encoders: dict[str, str]


class LoadedCollection(NamedTuple):
    """Prompts, by id, and what they were collected with."""

    prompts: list[CollectedPrompt]
    identity: CollectionIdentity


class Collection:
    """The stores of one folder, opened for writing with one target and its tokenizer.

    Each raises StoreError if the folder holds rows that were made with something else.
    """

    def __init__(
        self, folder: Path, target: str, tokenizer: str, none: str, hidden_size: int
    ) -> None:
        """target: the model's fingerprint; tokenizer: hash of its token-to-id map; none: the line
        of that arm, which decoded the trajectories; hidden_size: the target's.
        """
        self.folder = Path(folder)
        self._target = target
        # the first store to be opened, because it claims the folder for this target
        self.trajectories = self._open(TRAJECTORIES, "", {"tokenizer": tokenizer})
        facts: dict[str, Any] = {NONE: none, _HIDDEN_SIZE: hidden_size}
        if self.trajectories.facts != facts:
            self.trajectories.record(**facts)

    def features(self, encoder: str, identity: str) -> ShardStore:
        """identity: the encoder's own line."""
        return self._open(FEATURES, encoder, {"encoder": identity})

    def replays(self, drafter: str, identity: str) -> ShardStore:
        """identity: the drafter's line from `contracts.identity_of_arms`."""
        return self._open(REPLAYS, drafter, {"arm": identity})

    def scores(self, drafter: str, identity: str) -> ShardStore:
        """Closeness to the target's distributions, by position, of chain drafters; as `replays`."""
        return self._open(SCORES, drafter, {"arm": identity})

    def outputs(self, writer: str, identity: str) -> ShardStore:
        """What a drafter or any other model wrote itself, by prompt id; empty where it could not."""
        return self._open(OUTPUTS, writer, {"arm": identity})

    def _open(self, kind: str, name: str, made_with: dict[str, Any]) -> ShardStore:
        folder = folder_of(self.folder, kind, name)
        remedy = "collect into a new folder"
        if kind != TRAJECTORIES:
            remedy = f"delete {folder} and run `paceline collect PROMPTS` again"
        identity = {"target": self._target, **made_with}
        return ShardStore(folder, kind, SCHEMAS[kind], identity, remedy)


def load_collection(
    folder: Path,
    arms: Sequence[str] | None = None,
    encoders: Sequence[str] = DEFAULT_ENCODERS,
) -> LoadedCollection:
    """The whole of a collection, with the replays of `arms` (None: of every drafter it has) and the
    features of `encoders`, side by side in their order.

    Raises StoreError if the collection is empty, unfinished, damaged, of another format, or without one
    of the arms or encoders.
    """
    folder = Path(folder)
    store = open_trajectories(folder)
    if store.num_rows == 0:
        raise StoreError(f"{folder}: the collection is empty; run `paceline collect PROMPTS`")
    # by id, so that nothing learned depends on the order of collecting
    rows = sorted(read_trajectories(store), key=lambda row: row.id)
    target = str(store.identity["target"])
    features, spans, encoder_lines = _read_features(folder, encoders, target, rows)
    if arms is None:
        arms = names_of(folder, REPLAYS)
    replays, scores, lines = _read_replays(folder, arms, target, rows)
    outputs = _read_outputs(folder, target)
    prompts = [
        CollectedPrompt(
            id=row.id,
            domain=row.domain,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            max_new_tokens=row.max_new_tokens,
            features=features[i],
            replays={arm: of_arm[i] for arm, of_arm in replays.items()},
            draft_outputs={
                writer: by_id[row.prompt_id]
                for writer, by_id in outputs.items()
                if row.prompt_id in by_id
            },
            scores={arm: of_arm[i] for arm, of_arm in scores.items()},
            sampling=row.sampling,
            spans=spans,
        )
        for i, row in enumerate(rows)
    ]
    identity = CollectionIdentity(
        target=target,
        tokenizer=str(store.identity["tokenizer"]),
        hidden_size=int(store.facts[_HIDDEN_SIZE]),
        arms={NONE: str(store.facts[NONE]), **lines},
        encoders=encoder_lines,
    )
    return LoadedCollection(prompts, identity)


def read_trajectories(store: ShardStore) -> list[Trajectory]:
    """The rows of `Collection.trajectories`, in the order in which they were written."""
    columns = _read(store)
    return [
        Trajectory.of(dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]


def read_overlaps(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """drafter -> row's id -> sum of min(p, q) at each of its tokens, where that was scored."""
    overlaps: dict[str, dict[str, np.ndarray]] = {}
    for drafter in names_of(folder, SCORES):
        columns = _read(_open_existing(Path(folder), SCORES, drafter))
        overlaps[drafter] = dict(zip(columns["id"], columns["overlap"], strict=True))
    return overlaps


def is_collection(folder: Path) -> bool:
    """Return whether a folder holds a collection, of any version."""
    return folder_of(folder, TRAJECTORIES).is_dir()


def open_trajectories(folder: Path) -> ShardStore:
    """The trajectories of an existing collection, for `read_trajectories`, whatever made them."""
    if not is_collection(folder):
        raise StoreError(f"{folder}: no collection here; run `paceline collect PROMPTS`")
    return _open_existing(Path(folder), TRAJECTORIES)


def _open_existing(folder: Path, kind: str, name: str = "") -> ShardStore:
    return ShardStore.open(folder_of(folder, kind, name), kind, SCHEMAS[kind])


def _read_beside(
    folder: Path, kind: str, name: str, target: str, ids: Sequence[str]
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """(columns in the order of `ids`, identity) of a store that must cover all of the ids."""
    where = folder_of(folder, kind, name)
    if not where.is_dir():
        what = f"arm '{name}' is not" if kind == REPLAYS else f"the {kind} of '{name}' are not"
        raise StoreError(
            f"{folder}: {what} in this collection; run `paceline collect PROMPTS` again to add "
            "what this configuration names"
        )
    store = _open_existing(folder, kind, name)
    _check_target(store, where, target)
    columns = _read(store)
    place = {id: i for i, id in enumerate(columns["id"])}
    num_there = sum(id in place for id in ids)
    if num_there < len(ids):
        raise StoreError(
            f"{where}: covers {num_there} of {len(ids)} prompts; run `paceline collect PROMPTS` again "
            "to finish it"
        )
    order = [place[id] for id in ids]
    return {key: [column[i] for i in order] for key, column in columns.items()}, store.identity


def _check_target(store: ShardStore, where: Path, target: str) -> None:
    if store.identity.get("target") != target:
        raise StoreError(
            f"{where}: was made with target {store.identity.get('target')!r}, the trajectories "
            f"with {target!r}; delete it and run `paceline collect PROMPTS` again"
        )


def _read_features(
    folder: Path, encoders: Sequence[str], target: str, rows: Sequence[Trajectory]
) -> tuple[np.ndarray, dict[str, slice], dict[str, str]]:
    """([N, F] of all encoders side by side, encoder -> its part, encoder -> identity line)."""
    parts, spans, lines, start = [np.zeros((len(rows), 0), np.float32)], {}, {}, 0
    for encoder in encoders:
        columns, made_with = _read_beside(folder, FEATURES, encoder, target, [r.id for r in rows])
        widths = {len(of_row) for of_row in columns["features"]}
        if len(widths) > 1:
            raise StoreError(
                f"{folder_of(folder, FEATURES, encoder)}: rows of {min(widths)} and of "
                f"{max(widths)} features; delete it and run `paceline collect PROMPTS` again"
            )
        parts.append(np.stack(columns["features"]))
        spans[encoder] = slice(start, start := start + parts[-1].shape[1])
        lines[encoder] = str(made_with["encoder"])
    return np.concatenate(parts, axis=1), spans, lines


def _read_replays(
    folder: Path, arms: Iterable[str], target: str, rows: Sequence[Trajectory]
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
        replays, made_with = _read_beside(folder, REPLAYS, arm, target, [r.id for r in rows])
        columns = (replays["drafted"], replays["accepted"], replays["everywhere"])
        found[arm] = [
            ReplayedDrafter(np.stack((drafted, accepted), axis=1), everywhere)
            for drafted, accepted, everywhere in zip(*columns, strict=True)
        ]
        _check_fit(folder_of(folder, REPLAYS, arm), found[arm], rows)
        scores[arm] = list(zip(replays["match"], replays["confidence"], strict=True))
        lines[arm] = str(made_with["arm"])
    return found, scores, lines


def _check_fit(where: Path, replays: Sequence[ReplayedDrafter], rows: Sequence[Trajectory]) -> None:
    """A replay is of its trajectory: an entry a position, or rounds that emit it token by token. A
    round emits its accepted tokens and one more, except a last one that ends the answer.
    """
    for row, of_prompt in zip(rows, replays, strict=True):
        table = of_prompt.table
        emitted = 1 + len(table)
        if not of_prompt.everywhere:
            emitted += int(table[:, 1].sum())
        slack = 0 if of_prompt.everywhere or not len(table) else 1
        if not 0 <= emitted - len(row.output_tokens) <= slack:
            raise StoreError(
                f"{where}: the replay of '{row.id}' is not of the trajectory collected here; delete "
                "it and run `paceline collect PROMPTS` again"
            )


def _read_outputs(folder: Path, target: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """writer -> prompt id -> what it wrote, as far as it was asked."""
    outputs: dict[str, dict[str, tuple[int, ...]]] = {}
    for writer in names_of(folder, OUTPUTS):
        store = _open_existing(folder, OUTPUTS, writer)
        _check_target(store, folder_of(folder, OUTPUTS, writer), target)
        columns = _read(store)
        pairs = zip(columns["id"], columns["output_tokens"], strict=True)
        outputs[writer] = {id: tuple(tokens.tolist()) for id, tokens in pairs}
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
