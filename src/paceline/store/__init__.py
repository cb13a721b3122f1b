"""KEEP: Parquet shards with a manifest. Knows schemas and atomic writes, not what the rows mean."""

from paceline.store.collection import Collection, is_collection, load_collection
from paceline.store.decisions import DecisionLog, LoggedDecision, LogHeader, read_decisions
from paceline.store.prompts import (
    PromptFields,
    is_validation,
    read_prompts,
    take_by_hash,
    training_part,
)
from paceline.store.shards import ShardStore
from paceline.store.trained_on import TrainedOn

__all__ = [
    "Collection",
    "DecisionLog",
    "LogHeader",
    "LoggedDecision",
    "PromptFields",
    "ShardStore",
    "TrainedOn",
    "is_collection",
    "is_validation",
    "load_collection",
    "read_decisions",
    "read_prompts",
    "take_by_hash",
    "training_part",
]
