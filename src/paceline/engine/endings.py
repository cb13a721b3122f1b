"""The end of an answer at a stop string, and the answer's text.

A stop string ends the answer at the token that completes it: in the text, or if it names a special
token, in the text with special tokens spelled out. The text ends before it, without special tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.engine.reading import IncrementalText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Request
    from paceline.models.detokenizer import Detokenizer


class StopFinder:
    """The search for stop strings in one answer, token by token."""

    def __init__(self, detokenizer: Detokenizer, stop_strings: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        byte_of = detokenizer.byte_of
        self._text = _TextSearch(IncrementalText(detokenizer.decode, byte_of), stop_strings)
        # special tokens are absent from the first search's text, and spelled out in the second's
        named = naming_special(detokenizer, stop_strings)
        spelled = IncrementalText(detokenizer.spell, byte_of)
        self._spelled = _TextSearch(spelled, named) if named else None

    def push(self, token: int) -> bool:
        """Take a token; return whether it completes a stop string."""
        silent = self._detokenizer.is_silent(token)
        is_complete = not silent and self._text.push(token)
        if self._spelled is not None and (not silent or token in self._detokenizer.special):
            is_complete = self._spelled.push(token) or is_complete
        return is_complete


class _TextSearch:
    def __init__(self, reader: IncrementalText, stop_strings: Sequence[str]) -> None:
        self._reader = reader
        self._stops = stop_strings
        self._tail_length = max(map(len, stop_strings)) - 1
        self._tail = ""  # end of the settled text in which a stop string may begin

    def push(self, token: int) -> bool:
        """Take a token; return whether the text contains a stop string now."""
        settled = self._tail + self._reader.push((token,))
        text = settled + self._reader.open_text()
        self._tail = settled[-self._tail_length :] if self._tail_length else ""
        return any(stop in text for stop in self._stops)


def naming_special(detokenizer: Detokenizer, stop_strings: Sequence[str]) -> list[str]:
    """Return the stop strings that contain the name of a special token."""
    return [stop for stop in stop_strings if any(s in stop for s in detokenizer.special.values())]


def final_text(output: Sequence[int], request: Request, detokenizer: Detokenizer) -> str:
    """Return the text of an answer, without stop token and special tokens, cut before a stop string."""
    if output and output[-1] in request.stop_token_ids:
        output = output[:-1]
    text, stops = detokenizer.decode(output), request.stop_strings
    ends = [i for stop in stops if (i := text.find(stop)) >= 0]
    texts = [text[: min(ends)] if ends else text]
    named = naming_special(detokenizer, stops) if stops else []
    if named:
        spelled = detokenizer.spell(output)
        places = [i for stop in named if (i := spelled.find(stop)) >= 0]
        if places:
            # with special tokens spelled out, a decoder may add blanks that are not in the text
            texts.append(
                _common_beginning(text, _text_before(detokenizer, output, spelled, min(places)))
            )
    return min(texts, key=len)


def _common_beginning(one: str, other: str) -> str:
    unequal = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(unequal, min(len(one), len(other)))]


def _text_before(detokenizer: Detokenizer, output: Sequence[int], spelled: str, end: int) -> str:
    """Return the text that precedes a place of the spelled-out text."""
    for count in range(len(output), -1, -1):
        before = detokenizer.spell(output[:count])
        if len(before) <= end and spelled.startswith(before):
            break
    # a stop string may begin inside a token; of a special token, only the blank that the decoder writes
    # before its name is text
    name = detokenizer.special.get(output[count]) if count < len(output) else None
    named_at = spelled.find(name, len(before)) if name is not None else -1
    cut = end if named_at < 0 else min(end, named_at)
    return detokenizer.decode(output[:count]) + spelled[len(before) : cut]
