"""COLLECT: prompts to trajectories, replays and features in a store."""
