"""KEEP: Parquet shards with a manifest. Knows schemas and atomic writes, not what the rows mean."""

from paceline.store.shards import ShardStore, write_atomically

__all__ = ["ShardStore", "write_atomically"]
