"""REPEAT: the offline verbs on one configuration, the demo, and experiments that combine all rooms."""

from paceline.experiments.demo_job import demo
from paceline.experiments.pipeline import collect, evaluate, learn, profile

__all__ = ["collect", "demo", "evaluate", "learn", "profile"]
