"""REPLAY: the rounds of drafters along trajectories, without the engine."""

from paceline.replay.priced import price_stops
from paceline.replay.rounds import (
    max_output,
    replay,
    rounds_of,
    simulate,
    target_distributions,
    walk,
)

__all__ = [
    "max_output",
    "price_stops",
    "replay",
    "rounds_of",
    "simulate",
    "target_distributions",
    "walk",
]
