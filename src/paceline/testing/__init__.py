"""Fakes a user may also need: tiny random targets, a byte tokenizer, a scripted drafter."""

from typing import Final

HANGS: Final = 900.0
"""Seconds after which a waiting test fails; far more than any test needs."""
