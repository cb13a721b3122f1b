"""Streaming of text while it is decoded, without half characters and without parts of stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.engine.endings import naming_special
from paceline.engine.reading import IncrementalText
from paceline.errors import DecodingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.models.detokenizer import Detokenizer


class TextStream:
    """Pieces of an answer's text, which together are the whole text.

    A piece excludes open text (see `reading`) and an end of the text that may begin a stop string.
    """

    def __init__(self, detokenizer: Detokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._reader = IncrementalText(detokenizer.decode, detokenizer.byte_of)
        self._partial_matches = [_PartialMatch(stop, detokenizer) for stop in stop_strings]
        self._held = ""
        self._sent: list[str] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Take new tokens; return the text that is final."""
        is_silent = self._detokenizer.is_silent
        settled = self._reader.push(token for token in tokens if not is_silent(token))
        for match in self._partial_matches:
            match.push(settled)
        self._held += settled
        end = len(self._held) - max((m.length for m in self._partial_matches), default=0)
        piece, self._held = self._held[:end], self._held[end:]
        if piece:
            self._sent.append(piece)
        return piece

    def finish(self, text: str) -> str:
        """Return the last piece of an answer that has ended. text: the whole answer, cut at its stop.

        Raises DecodingError if the text does not begin with the pieces so far.
        """
        sent = "".join(self._sent)
        if not text.startswith(sent):
            raise DecodingError(
                "the tokenizer changed text after it was streamed, so the pieces are not the text; "
                "use complete()"
            )
        return text[len(sent) :]


class _PartialMatch:
    """The length of the end of a text that may be the beginning of one stop string.

    Special tokens leave no text, so a stop string that names one matches without its name.
    """

    def __init__(self, stop: str, detokenizer: Detokenizer) -> None:
        self._stop = stop
        self._names = (
            list(detokenizer.special.values()) if naming_special(detokenizer, [stop]) else []
        )
        self._matches: dict[int, set[int]] = {}  # characters matched since -> places in the stop
        # it may also begin inside a special token's name
        inside = {
            len(name) - k
            for name in self._names
            for k in range(len(name))
            if stop.startswith(name[k:])
        }
        starts = {0} | inside if self._names else {0}
        blanks = {place + 1 for place in starts if self._names and stop.startswith(" ", place)}
        self._first = self._reached(starts | blanks)
        # places where the text may have a blank that the spelled-out text has elsewhere or lacks; also
        # before the stop string, since a decoder may omit the blank where the text is cut
        self._optional_blanks = inside | {
            place
            for place in range(len(stop) + 1)
            for name in self._names
            if place == 0 or stop.startswith(name, place) or stop.endswith(name, 0, place)
        }

    @property
    def length(self) -> int:
        return max(self._matches, default=0)

    def push(self, text: str) -> None:
        for character in text:
            matches: dict[int, set[int]] = {}
            for length, places in (*self._matches.items(), (0, self._first)):
                matched = {
                    p + 1 for p in places if p < len(self._stop) and self._stop[p] == character
                }
                if character == " ":
                    matched |= places & self._optional_blanks
                # a complete stop string has ended the answer already, or is not one
                if (places := self._reached(matched)) - {len(self._stop)}:
                    matches[length + 1] = places
            self._matches = matches

    def _reached(self, places: set[int]) -> set[int]:
        """Return these places and those after special tokens that start there.

        A blank next to a special token may exist in the spelled-out text only.
        """
        todo = list(places) if self._names else []
        while todo:
            place = todo.pop()
            for name in self._names:
                for start in (place, place + self._stop.startswith(" ", place)):
                    if not self._stop.startswith(name, start):
                        continue
                    after = start + len(name)
                    new = {after, after + self._stop.startswith(" ", after)} - places
                    places |= new
                    todo += new
        return places
