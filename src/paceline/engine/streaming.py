"""Text that leaves while it is decoded: never half a character, never part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.engine.stops import Decode

_BROKEN: Final = "\ufffd"  # how a decoder shows bytes that are no character yet


class TextStream:
    """Turns tokens as they are committed into pieces of text that together are the whole.

    Held back: a tail that is not a whole character yet, and a tail with which a stop string could
    begin. Decoding starts a few tokens back, because how a token reads may hang on its neighbours.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stop_strings)
        self._tokens: list[int] = []
        self._read = 0  # tokens whose text is in `_held` or has left
        self._base = 0  # where decoding starts
        self._held = ""
        self._num_sent = 0  # characters

    def push(self, tokens: Sequence[int]) -> str:
        """Take new tokens; the text that may leave now."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._base : self._read])
        after = self._decode(self._tokens[self._base :])
        if after.endswith(_BROKEN) or not after.startswith(before):
            return ""  # more bytes are needed
        self._held += after[len(before) :]
        self._base, self._read = self._read, len(self._tokens)
        stop = len(self._held) - self._longest_stop_beginning()
        piece, self._held = self._held[:stop], self._held[stop:]
        self._num_sent += len(piece)
        return piece

    def finish(self, text: str) -> str:
        """The last piece of an answer that has ended. text: the whole of it, cut at its stop."""
        return text[self._num_sent :]

    def _longest_stop_beginning(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
