"""Streaming of text while it is decoded, without half characters and without parts of stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.engine.endings import naming_special
from paceline.engine.reading import Reader
from paceline.errors import DecodingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.models.detokenizer import Detokenizer


class TextStream:
    """Pieces of text from tokens as they are committed; the pieces together are the answer's text.

    Held back are open text (see `reading`) and a tail with which a stop string could begin.
    """

    def __init__(self, words: Detokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._words = words
        self._reader = Reader(words.decode, words.byte_of)
        self._beginnings = [_Beginnings(stop, self._words) for stop in stop_strings]
        self._held = ""
        self._sent: list[str] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Take new tokens; return the text that is final."""
        words = self._words
        settled = self._reader.push(t for t in tokens if not words.is_silent(t))
        for beginning in self._beginnings:
            beginning.push(settled)
        self._held += settled
        end = len(self._held) - max((b.length for b in self._beginnings), default=0)
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


class _Beginnings:
    """The end of a text that may be the beginning of one stop string.

    Special tokens leave no text, so a stop string that names one matches without its name.
    """

    def __init__(self, stop: str, words: Detokenizer) -> None:
        self._stop = stop
        self._unseen = list(words.special.values()) if naming_special(words, [stop]) else []
        self._matches: dict[int, set[int]] = {}  # characters matched since -> places in the stop
        # it may also begin inside a special token's name
        inside = {
            len(name) - k
            for name in self._unseen
            for k in range(len(name))
            if stop.startswith(name[k:])
        }
        starts = {0} | inside if self._unseen else {0}
        blanks = {place + 1 for place in starts if self._unseen and stop.startswith(" ", place)}
        self._new = self._reached(starts | blanks)
        # places where the text may have a blank that the spelled-out text has elsewhere or lacks; also
        # before the stop string, since a decoder may omit the blank where the text is cut
        self._shadows = inside | {
            place
            for place in range(len(stop) + 1)
            for name in self._unseen
            if place == 0 or stop.startswith(name, place) or stop.endswith(name, 0, place)
        }

    @property
    def length(self) -> int:
        return max(self._matches, default=0)

    def push(self, text: str) -> None:
        for character in text:
            matches: dict[int, set[int]] = {}
            for length, places in (*self._matches.items(), (0, self._new)):
                met = {p + 1 for p in places if p < len(self._stop) and self._stop[p] == character}
                if character == " ":
                    met |= places & self._shadows
                # a complete stop string has ended the answer already, or is none
                if (places := self._reached(met)) - {len(self._stop)}:
                    matches[length + 1] = places
            self._matches = matches

    def _reached(self, places: set[int]) -> set[int]:
        """Return these places and those after special tokens that start there.

        A blank next to a special token may exist in the spelled-out text only.
        """
        todo = list(places) if self._unseen else []
        while todo:
            place = todo.pop()
            for name in self._unseen:
                for start in (place, place + self._stop.startswith(" ", place)):
                    if not self._stop.startswith(name, start):
                        continue
                    behind = start + len(name)
                    new = {behind, behind + self._stop.startswith(" ", behind)} - places
                    places |= new
                    todo += new
        return places
