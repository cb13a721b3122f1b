"""COLLECT: prompts to trajectories, replays and features in a store."""

from paceline.collection.collect import CollectionReport, collect_trajectories
from paceline.collection.from_log import LogReport, collect_log

__all__ = ["CollectionReport", "LogReport", "collect_log", "collect_trajectories"]
