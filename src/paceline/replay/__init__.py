"""REPLAY: drafters along trajectories, beside the engine and without it."""
