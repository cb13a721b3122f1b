"""DECODE: rows of requests, in rounds of draft, verify, commit.

This room knows no tokenizer, policy or file: the caller passes the functions `choose` and `decode`.
"""

from paceline.engine.driver import Driver, raise_failure
from paceline.engine.loop import Engine
from paceline.engine.rows import RequestUpdate
from paceline.engine.streaming import TextStream

__all__ = ["Driver", "Engine", "RequestUpdate", "TextStream", "raise_failure"]
