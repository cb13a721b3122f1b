"""REPEAT: the demo, and experiments that combine all rooms."""

from paceline.experiments.demo import demo

__all__ = ["demo"]
