"""TEST: tiny random targets, a byte tokenizer and scripted drafters, for users' tests too."""

from typing import Final

HANGS: Final = 900.0
"""Timeout of a waiting test in seconds; no working test needs as long."""
