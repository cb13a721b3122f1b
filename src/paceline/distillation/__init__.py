"""DISTIL: train drafters against the target, on text that the target itself wrote."""
