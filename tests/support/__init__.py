"""What several rooms' tests share: references, example drafters, models with other tokens."""

from typing import Final

HANGS: Final = 900.0
"""Timeout of a waiting test in seconds; no working test needs as long."""
