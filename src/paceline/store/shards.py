"""An append-only table of rows with an `id`, in Parquet shards that survive a kill at any moment.

A shard is written under a temporary name and renamed. The manifest is replaced last and alone says
which shards exist: a shard that it does not list was never finished and is written again. So each id is
stored once, and a resumed run skips exactly the stored ids.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from paceline.errors import StoreError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

FORMAT_VERSION: Final = 1
_MANIFEST: Final = "manifest.json"


class ShardStore:
    """Rows of one kind in one folder.

    `identity` names the models that made the rows; rows of other models are refused. `remedy` is the
    advice at the end of that message.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        schema: pa.Schema,
        identity: Mapping[str, Any],
        remedy: str = "collect into a new folder",
    ) -> None:
        """Open or create the folder. Raises StoreError if its rows differ in kind, columns, identity or
        format, or if its manifest is damaged.
        """
        self.folder = Path(folder)
        self.schema = schema
        self.kind = kind
        self.identity = dict(identity)
        self._remedy = remedy
        self._shards: list[dict[str, Any]] = []
        self._facts: dict[str, Any] = {}
        manifest = read_manifest(self.folder)
        if manifest is not None:
            self._check(manifest)
            self._shards = manifest["shards"]
            self._facts = manifest["facts"]
        else:
            # written at once, so that rows of other models are refused from now on
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest()

    @classmethod
    def open(cls, folder: Path, kind: str, schema: pa.Schema) -> ShardStore:
        """Open an existing store of any identity. Raises StoreError if there is none."""
        manifest = read_manifest(Path(folder))
        if manifest is None:
            raise StoreError(f"{folder}: no collection here; run `paceline collect PROMPTS` first")
        return cls(folder, kind, schema, manifest.get("identity", {}))

    def _check(self, manifest: dict[str, Any]) -> None:
        where = self.folder
        if manifest.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{where}: store format {manifest.get('format_version')}, this version of paceline "
                f"reads {FORMAT_VERSION}; {self._remedy} or use the version that made it"
            )
        if manifest.get("kind") != self.kind:
            raise StoreError(f"{where}: holds '{manifest.get('kind')}', not '{self.kind}'")
        if manifest.get("columns") != self.schema.names:
            raise StoreError(
                f"{where}: columns {manifest.get('columns')}, but {self.schema.names} are expected; "
                f"{self._remedy}"
            )
        theirs = manifest.get("identity", {})
        for key, value in self.identity.items():
            if theirs.get(key) != value:
                raise StoreError(
                    f"{where}: was made with {key} {theirs.get(key)!r}, now it is {value!r}; "
                    f"{self._remedy}"
                )
        shards, facts = manifest.get("shards"), manifest.get("facts")
        if not isinstance(shards, list) or not isinstance(facts, dict):
            raise StoreError(f"{where}: damaged manifest; delete this folder and collect again")

    def ids(self) -> set[str]:
        """Return the ids of all finished rows."""
        return {id for shard in self._shards for id in self._read_ids(shard)}

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as one new shard; when this returns, they survive a kill."""
        if not rows:
            return
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=self.schema)
        name = f"shard-{len(self._shards):05d}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        write_atomically(self.folder / name, data)
        self._shards.append({"file": name, "rows": len(rows), "sha256": _checksum(data)})
        self._write_manifest()

    def drop_last_shards_without(self, ids: AbstractSet[str]) -> None:
        """Remove shards from the end of the manifest until one holds any of these ids."""
        while self._shards and ids.isdisjoint(self._read_ids(self._shards[-1])):
            del self._shards[-1]
            self._write_manifest()

    def read(self) -> pa.Table:
        """Return all rows, in the order in which they were written."""
        tables = [self._read_shard(shard, None) for shard in self._shards]
        return pa.concat_tables(tables) if tables else self.schema.empty_table()

    @property
    def num_rows(self) -> int:
        return sum(shard["rows"] for shard in self._shards)

    @property
    def facts(self) -> dict[str, Any]:
        """Settings, versions and other facts of the rows that are not part of their identity."""
        return dict(self._facts)

    def record_facts(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        self._facts.update(facts)
        self._write_manifest()

    def _read_ids(self, shard: dict[str, Any]) -> list[str]:
        ids: list[str] = self._read_shard(shard, ["id"]).column("id").to_pylist()
        return ids

    def _read_shard(self, shard: dict[str, Any], columns: list[str] | None) -> pa.Table:
        path = self.folder / shard["file"]
        try:
            data = path.read_bytes()
            if shard.get("sha256", _checksum(data)) != _checksum(data):
                raise OSError("its checksum differs from the manifest's")
            table = pq.read_table(pa.BufferReader(data), columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                f"{path}: damaged ({error}); delete {self.folder} and collect again"
            ) from error
        if table.num_rows != shard["rows"]:
            raise StoreError(
                f"{path}: {table.num_rows} rows where the manifest says {shard['rows']}; "
                f"delete {self.folder} and collect again"
            )
        return table

    def _write_manifest(self) -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "columns": self.schema.names,
            "identity": self.identity,
            "facts": self._facts,
            "shards": self._shards,
        }
        write_atomically(self.folder / _MANIFEST, json.dumps(manifest, indent=1).encode())


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest, None if there is none. Raises StoreError if it is damaged."""
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); delete {folder}") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{path}: not a manifest; delete {folder} and collect again")
    return manifest
