"""DISTIL: train drafters on text that the target itself wrote."""
