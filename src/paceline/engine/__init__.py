"""DECODE: rows of requests through rounds of draft, verify, commit.

Knows no tokenizer, policy or file: `choose` and `decode` are functions it is given.
"""

from paceline.engine.driver import Driver, raise_failure
from paceline.engine.loop import Engine
from paceline.engine.rows import RequestUpdate
from paceline.engine.streaming import TextStream

__all__ = ["Driver", "Engine", "RequestUpdate", "TextStream", "raise_failure"]
