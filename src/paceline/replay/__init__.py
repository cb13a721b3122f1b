"""REPLAY: the rounds of drafters along trajectories, without the engine."""

from paceline.replay.composed import calibrate, stored_drafters, with_cascades
from paceline.replay.priced import price_rounds, price_stops
from paceline.replay.rounds import (
    max_output,
    replay,
    rounds_of,
    simulate,
    target_distributions,
    walk,
)

__all__ = [
    "calibrate",
    "max_output",
    "price_rounds",
    "price_stops",
    "replay",
    "rounds_of",
    "simulate",
    "stored_drafters",
    "target_distributions",
    "walk",
    "with_cascades",
]
