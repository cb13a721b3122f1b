"""paceline: a language model answers faster, without changing what it answers."""

from __future__ import annotations

__version__ = "0.1.0"
