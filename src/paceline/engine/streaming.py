"""Text that leaves while it is decoded: never half a character, never part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.engine.reading import Reader
from paceline.engine.stops import naming_special
from paceline.errors import DecodingError
from paceline.models.detokenizer import Detokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.engine.stops import Decode


class TextStream:
    """Turns tokens as they are committed into pieces of text that together are the whole.

    Held back: what is not settled yet (see `reading`), and a tail with which a stop string could begin.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()) -> None:
        self._words = Detokenizer.wrap(decode)
        self._reader = Reader(self._words.decode, self._words.byte_of)
        self._beginnings = [_Beginnings(stop, self._words) for stop in stop_strings]
        self._held = ""
        self._sent: list[str] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Take new tokens; the text that may leave now."""
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
        """The last piece of an answer that has ended. text: the whole of it, cut at its stop.

        Raises DecodingError if it is not what the pieces so far began.
        """
        sent = "".join(self._sent)
        if not text.startswith(sent):
            raise DecodingError(
                "the tokenizer's text changed after it was streamed, so the pieces are not the "
                "text; use complete()"
            )
        return text[len(sent) :]


class _Beginnings:
    """How much of a text's end one stop string may begin with.

    Special tokens are not seen in the text, so a stop string that names one may go on without it.
    """

    def __init__(self, stop: str, words: Detokenizer) -> None:
        self._stop = stop
        self._unseen = list(words.special.values()) if naming_special(words, [stop]) else []
        self._matches: dict[int, set[int]] = {}  # characters matched since -> places in the stop
        # it may begin inside a special token's name, too
        inside = {
            len(name) - k
            for name in self._unseen
            for k in range(len(name))
            if stop.startswith(name[k:])
        }
        starts = {0} | inside if self._unseen else {0}
        blanks = {place + 1 for place in starts if self._unseen and stop.startswith(" ", place)}
        self._new = self._reached(starts | blanks)
        # where a blank of the text may be one that the spelled-out text has elsewhere or lacks; before
        # the stop string, since a decoder may leave it out where the text is cut
        self._beside = inside | {
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
                    met |= places & self._beside
                # one that is complete has ended the answer already, or was none
                if (places := self._reached(met)) - {len(self._stop)}:
                    matches[length + 1] = places
            self._matches = matches

    def _reached(self, places: set[int]) -> set[int]:
        """These places, and those behind special tokens that stand there.

        A blank beside a special token may be there only where it is spelled out.
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
