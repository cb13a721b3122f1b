"""KEEP: Parquet shards with a manifest. Knows schemas and atomic writes, not what the rows mean."""

from paceline.files import write_atomically
from paceline.store.collection import Collection, LoadedCollection, load_collection
from paceline.store.prompts import PromptFields, is_validation, read_prompts, take_by_hash
from paceline.store.shards import ShardStore

__all__ = [
    "Collection",
    "LoadedCollection",
    "PromptFields",
    "ShardStore",
    "is_validation",
    "load_collection",
    "read_prompts",
    "take_by_hash",
    "write_atomically",
]
