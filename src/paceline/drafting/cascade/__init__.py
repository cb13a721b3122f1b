"""Drafters that work together: each round takes the draft with the most expected tokens per second."""
