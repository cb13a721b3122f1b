"""REPLAY: drafters along trajectories, beside the engine and without it."""

from paceline.replay.priced import price_stops
from paceline.replay.rounds import Replay, max_output, replay, simulate, target_distributions

__all__ = ["Replay", "max_output", "price_stops", "replay", "simulate", "target_distributions"]
