"""A collection: everything known of a set of prompts, stored so that each is decoded only once.

Trajectories have one shard store. So have the features of every encoder, the replays and scores of
every drafter, and the outputs of every writer: each can be added later, and is finished or resumed
on its own. Rows are joined by id. Knows neither models nor costs. Symbols: T output tokens, F features.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from paceline.config import DEFAULT_ENCODERS
from paceline.contracts import NONE
from paceline.errors import StoreError
from paceline.store.layout import (
    FEATURES,
    OUTPUTS,
    REPLAYS,
    SCHEMAS,
    SCORES,
    TRAINED_ON,
    TRAJECTORIES,
    Trajectory,
    list_names,
    store_folder,
)
from paceline.store.records import CollectedPrompt, DraftNodes, ReplayedDrafter
from paceline.store.shards import ShardStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    Columns = dict[str, list[Any]]

_HIDDEN_SIZE = "hidden_size"


class CollectionIdentity(NamedTuple):
    """The models that a collection was made with.

    `arms` maps each drafter, `none` first, to its identity line; `encoders` maps each encoder, in the
    order of the features, to its own.
    """

    target: str
    tokenizer: str
    hidden_size: int
    arms: dict[str, str]
    encoders: dict[str, str]


class LoadedCollection(NamedTuple):
    """Prompts, sorted by id, and the models that they were collected with."""

    prompts: list[CollectedPrompt]
    identity: CollectionIdentity


class Collection:
    """The stores of one folder, opened for writing with one target and its tokenizer.

    Every method that opens a store raises StoreError if its rows were made with other models.
    """

    def __init__(
        self, folder: Path, target: str, tokenizer: str, none: str, hidden_size: int
    ) -> None:
        """Open or create the folder. target: the model's fingerprint; tokenizer: hash of its token-to-id
        map; none: identity line of the arm `none`, which decoded the trajectories.
        """
        self.folder = Path(folder)
        self._target = target
        # opened first, because it claims the folder for this target
        self.trajectories = self._open(TRAJECTORIES, "", {"tokenizer": tokenizer})
        facts: dict[str, Any] = {NONE: none, _HIDDEN_SIZE: hidden_size}
        if self.trajectories.facts != facts:
            self.trajectories.record_facts(**facts)

    def features(self, encoder: str, identity: str) -> ShardStore:
        """Open the features of an encoder. identity: the encoder's own line."""
        return self._open(FEATURES, encoder, {"encoder": identity})

    def replays(self, drafter: str, identity: str) -> ShardStore:
        """Open the replays of a drafter. identity: its line from `contracts.identity_of_arms`."""
        return self._open(REPLAYS, drafter, {"arm": identity})

    def scores(self, drafter: str, identity: str) -> ShardStore:
        """Open a chain drafter's closeness to the target's distributions, per position."""
        return self._open(SCORES, drafter, {"arm": identity})

    def outputs(self, writer: str, identity: str) -> ShardStore:
        """Open the outputs of a drafter or any other model, by prompt id; an output may be empty."""
        return self._open(OUTPUTS, writer, {"arm": identity})

    def trained_on(self, drafter: str, identity: str, prompts: str) -> ShardStore:
        """Open the record of the prompts that a drafter was trained on. prompts: hash of all of them."""
        return self._open(TRAINED_ON, drafter, {"arm": identity, "prompts": prompts})

    def _open(self, kind: str, name: str, made_with: dict[str, Any]) -> ShardStore:
        folder = store_folder(self.folder, kind, name)
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
    """Load a whole collection with the replays of `arms` (None: of every drafter that was replayed)
    and the features of `encoders`, concatenated in their order.

    Raises StoreError if the collection is empty, unfinished, damaged, of another format, or without one
    of the arms or encoders.
    """
    folder = Path(folder)
    store = open_trajectories(folder)
    if store.num_rows == 0:
        raise StoreError(f"{folder}: the collection is empty; run `paceline collect PROMPTS`")
    # by id, so that nothing learned depends on the order of collecting
    rows = sorted(read_trajectories(store), key=lambda row: row.id)
    reader = _Reader(folder, str(store.identity["target"]), rows)
    features, spans, encoder_lines = reader.read_features(encoders)
    names = list_names(folder, REPLAYS) if arms is None else arms
    drafters = [reader.read_drafter(name) for name in names if name != NONE]
    outputs = reader.read_outputs()
    trained_on = {d.name: reader.read_trained_on(d) for d in drafters}
    prompts = [
        CollectedPrompt(
            id=row.id,
            domain=row.domain,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            max_new_tokens=row.max_new_tokens,
            features=features[i],
            replays={drafter.name: drafter.replays[i] for drafter in drafters},
            draft_outputs={
                writer: by_id[row.prompt_id]
                for writer, by_id in outputs.items()
                if row.prompt_id in by_id
            },
            scores={drafter.name: drafter.scores[i] for drafter in drafters},
            nodes={d.name: d.nodes[i] for d in drafters if d.nodes is not None},
            sampling=row.sampling,
            spans=spans,
            trained_on={
                name: by_id[row.prompt_id]
                for name, by_id in trained_on.items()
                if row.prompt_id in by_id
            },
        )
        for i, row in enumerate(rows)
    ]
    identity = CollectionIdentity(
        target=reader.target,
        tokenizer=str(store.identity["tokenizer"]),
        hidden_size=int(store.facts[_HIDDEN_SIZE]),
        arms={NONE: str(store.facts[NONE]), **{d.name: d.identity for d in drafters}},
        encoders=encoder_lines,
    )
    return LoadedCollection(prompts, identity)


def read_trajectories(store: ShardStore) -> list[Trajectory]:
    """Return the rows of `Collection.trajectories`, in the order in which they were written."""
    columns = _read_columns(store)
    return [
        Trajectory.from_row(dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]


def read_overlaps(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return drafter -> row's id -> sum of min(p, q) per output token [T], for scored drafters."""
    overlaps: dict[str, dict[str, np.ndarray]] = {}
    for drafter in list_names(folder, SCORES):
        columns = _read_columns(_open_existing(Path(folder), SCORES, drafter))
        overlaps[drafter] = dict(zip(columns["id"], columns["overlap"], strict=True))
    return overlaps


def is_collection(folder: Path) -> bool:
    """Return whether a folder holds a collection, of any version."""
    return store_folder(folder, TRAJECTORIES).is_dir()


def open_trajectories(folder: Path) -> ShardStore:
    """Open the trajectories of an existing collection, of any target, for `read_trajectories`.

    Raises StoreError if the folder holds no collection.
    """
    if not is_collection(folder):
        raise StoreError(f"{folder}: no collection here; run `paceline collect PROMPTS`")
    return _open_existing(Path(folder), TRAJECTORIES)


def _open_existing(folder: Path, kind: str, name: str = "") -> ShardStore:
    return ShardStore.open(store_folder(folder, kind, name), kind, SCHEMAS[kind])


class _Drafter(NamedTuple):
    """One drafter's stored results, in the order of the trajectories."""

    name: str
    identity: str
    replays: list[ReplayedDrafter]
    scores: list[tuple[np.ndarray, np.ndarray]]  # match, confidence
    nodes: list[DraftNodes] | None  # of a lookup


class _Reader:
    """Reads the other stores of a collection in the order of its trajectories."""

    def __init__(self, folder: Path, target: str, rows: Sequence[Trajectory]) -> None:
        self._folder, self.target, self._rows = folder, target, rows

    def read_features(
        self, encoders: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, slice], dict[str, str]]:
        """Return ([N, F] of all encoders, encoder -> its columns, encoder -> identity line)."""
        parts, spans, lines, start = [np.zeros((len(self._rows), 0), np.float32)], {}, {}, 0
        for encoder in encoders:
            columns, identity = self._read(FEATURES, encoder)
            widths = {len(features) for features in columns["features"]}
            if len(widths) > 1:
                raise StoreError(
                    f"{store_folder(self._folder, FEATURES, encoder)}: rows of {min(widths)} and of "
                    f"{max(widths)} features; delete it and run `paceline collect PROMPTS` again"
                )
            parts.append(np.stack(columns["features"]))
            spans[encoder] = slice(start, start := start + parts[-1].shape[1])
            lines[encoder] = str(identity["encoder"])
        return np.concatenate(parts, axis=1), spans, lines

    def read_drafter(self, name: str) -> _Drafter:
        columns, identity = self._read(REPLAYS, name)
        rounds = zip(columns["drafted"], columns["accepted"], columns["everywhere"], strict=True)
        replays = [
            ReplayedDrafter(np.stack((drafted, accepted), axis=1), everywhere)
            for drafted, accepted, everywhere in rounds
        ]
        for row, replay in zip(self._rows, replays, strict=True):
            if not _is_replay_of(replay, row):
                raise StoreError(
                    f"{store_folder(self._folder, REPLAYS, name)}: the replay of '{row.id}' is not of "
                    "the trajectory collected here; delete it and run `paceline collect PROMPTS` again"
                )
        scores = list(zip(columns["match"], columns["confidence"], strict=True))
        drafted = zip(*(columns[key] for key in ("evidence", "parents", "kept")), strict=True)
        nodes = [
            DraftNodes(replay.table[:, 0].astype(np.int64), *values)
            for replay, values in zip(replays, drafted, strict=True)
        ]
        has_nodes = any(len(own.evidence) for own in nodes)
        return _Drafter(name, str(identity["arm"]), replays, scores, nodes if has_nodes else None)

    def read_outputs(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return writer -> prompt id -> output tokens, for the prompts that the writer answered."""
        outputs: dict[str, dict[str, tuple[int, ...]]] = {}
        for writer in list_names(self._folder, OUTPUTS):
            columns = _read_columns(self._open(OUTPUTS, writer))
            pairs = zip(columns["id"], columns["output_tokens"], strict=True)
            outputs[writer] = {id: tuple(tokens.tolist()) for id, tokens in pairs}
        return outputs

    def read_trained_on(self, drafter: _Drafter) -> dict[str, bool]:
        """Return prompt id -> whether the drafter was trained on it, where that is known.

        Raises StoreError if the record is of another drafter than the replays.
        """
        where = store_folder(self._folder, TRAINED_ON, drafter.name)
        if not where.is_dir():
            return {}
        store = self._open(TRAINED_ON, drafter.name)
        if store.identity.get("arm") != drafter.identity:
            raise StoreError(
                f"{where}: is the record of another drafter '{drafter.name}' than the one replayed; "
                "delete it and run `paceline collect PROMPTS` again"
            )
        columns = _read_columns(store)
        return dict(zip(columns["id"], columns["trained_on"], strict=True))

    def _read(self, kind: str, name: str) -> tuple[Columns, dict[str, Any]]:
        """Return (columns, identity) of a store that must cover all trajectories."""
        where = store_folder(self._folder, kind, name)
        if not where.is_dir():
            what = f"arm '{name}' is not" if kind == REPLAYS else f"the {kind} of '{name}' are not"
            raise StoreError(
                f"{self._folder}: {what} in this collection; run `paceline collect PROMPTS` again to "
                "add what this configuration names"
            )
        store = self._open(kind, name)
        columns = _read_columns(store)
        place = {id: i for i, id in enumerate(columns["id"])}
        order = [place[row.id] for row in self._rows if row.id in place]
        if len(order) < len(self._rows):
            raise StoreError(
                f"{where}: covers {len(order)} of {len(self._rows)} prompts; run `paceline collect "
                "PROMPTS` again to finish it"
            )
        return {key: [column[i] for i in order] for key, column in columns.items()}, store.identity

    def _open(self, kind: str, name: str) -> ShardStore:
        store = _open_existing(self._folder, kind, name)
        if store.identity.get("target") != self.target:
            raise StoreError(
                f"{store.folder}: was made with target {store.identity.get('target')!r}, the "
                f"trajectories with {self.target!r}; delete it and run `paceline collect PROMPTS` again"
            )
        return store


def _is_replay_of(replay: ReplayedDrafter, row: Trajectory) -> bool:
    """Return whether a replay's length fits its trajectory.

    `everywhere` has one entry per position. Rounds emit their accepted tokens and one more each, except
    a last one that ends the answer.
    """
    missing = len(row.output_tokens) - 1 - len(replay.table)
    if replay.everywhere or not len(replay.table):
        return missing == 0
    return int(replay.table[:, 1].sum()) - missing in (0, 1)


def _read_columns(store: ShardStore) -> Columns:
    """Return columns in the schema's order, each a list over rows; a list in a row is an array."""
    table = store.read()
    columns = zip(table.schema, table.columns, strict=True)
    return {
        field.name: _split_lists(column) if pa.types.is_list(field.type) else column.to_pylist()
        for field, column in columns
    }


def _split_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return one array per row of a column of lists, without a Python object per value."""
    lists = column.combine_chunks()
    values = lists.values.to_numpy(zero_copy_only=False)
    offsets = lists.offsets.to_numpy()
    return [values[a:b] for a, b in pairwise(offsets)]
