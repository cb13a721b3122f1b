"""KEEP: Parquet shards with a manifest. Knows schemas and atomic writes, not what the rows mean."""

from paceline.store.collection import Collection, is_collection, load_collection
from paceline.store.decisions import DecisionLog, LoggedDecision, LogHeader, read_decisions
from paceline.store.prompts import PromptFields, read_prompts, take_by_hash
from paceline.store.shards import ShardStore
from paceline.store.splits import (
    Part,
    hash_share,
    is_validation,
    part_of,
    take_part,
    take_part_of_files,
)
from paceline.store.trained_on import TrainedOn

__all__ = [
    "Collection",
    "DecisionLog",
    "LogHeader",
    "LoggedDecision",
    "Part",
    "PromptFields",
    "ShardStore",
    "TrainedOn",
    "hash_share",
    "is_collection",
    "is_validation",
    "load_collection",
    "part_of",
    "read_decisions",
    "read_prompts",
    "take_by_hash",
    "take_part",
    "take_part_of_files",
]
