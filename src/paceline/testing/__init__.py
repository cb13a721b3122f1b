"""Fakes a user may also need: tiny random targets, a byte tokenizer, a scripted drafter."""

from typing import Final

HANGS: Final = 900.0
"""Seconds after which a test takes what it waits for to hang; no test waits on a time to pass."""
