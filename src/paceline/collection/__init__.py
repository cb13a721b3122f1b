"""COLLECT: prompts to trajectories, replays and features in a store."""

from paceline.collection.collect import CollectionReport, collect

__all__ = ["CollectionReport", "collect"]
