"""The text of an answer as its tokens arrive, in linear time: the settled text and the open text.

Settled text remains a prefix of the answer's text, whatever tokens follow. Open text is made of the
bytes of an unfinished character, which a decoder shows as one U+FFFD, and of a run of byte tokens that
has not ended. Decoding starts a few tokens back, at a token from which the text is the same as from the
start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_BROKEN: Final = "\ufffd"  # a decoder's text for bytes that are not a character, or not yet
_WINDOW: Final = 16  # tokens decoded at once before the start moves
# tokens before the end where it may move: an unfinished character has at most 3 tokens, so one of four
# neighbouring places is not inside a character
_BACK: Final = range(8, 12)


class IncrementalText:
    """The settled and the open text of one answer. None of its tokens may be silent."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], byte_of: Mapping[int, int] | None = None
    ) -> None:
        """byte_of: the byte of each byte token, see `models.detokenizer`."""
        self._decode = decode
        self._byte_of = byte_of or {}
        self._window: list[int] = []  # the tokens that are decoded, without the open run
        self._run = bytearray()
        self._run_tokens: list[int] = []
        self._text = ""  # the window's text
        self._num_settled = 0  # characters of it

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens; return the text that they settle."""
        has_text = False
        for token in tokens:
            byte = self._byte_of.get(token)
            if byte is None:
                self._window += [*self._run_tokens, token]
                self._run.clear()
                self._run_tokens.clear()
                has_text = True
            else:
                self._run.append(byte)
                self._run_tokens.append(token)
        return self._settle() if has_text else ""

    def open_text(self) -> str:
        """Return the text after the settled text, which may still change."""
        rest = self._text[self._num_settled :]
        if not self._run:
            return rest
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            return rest + _BROKEN * len(self._run)
        if text.startswith(" ") and not self._text:
            first = self._decode([*self._window, self._run_tokens[0]])
            text = first + text[1:]  # a decoder may strip the space at the start
        return rest + text

    def _settle(self) -> str:
        before = self._text[: self._num_settled]
        text = self._decode(self._window)
        if not text.startswith(before):
            return ""  # the decoder has rewritten settled text: wait for more tokens
        self._text = text
        end = len(text) - text.endswith(_BROKEN)
        settled = text[self._num_settled : end]
        self._num_settled = max(end, self._num_settled)
        if len(self._window) > _WINDOW:
            self._shorten_window()
        return settled

    def _shorten_window(self) -> None:
        """Move the window's start to a few tokens before its end, where the text stays the same."""
        size = len(self._window)
        # part of a run of bytes may decode differently; after a run, the last token alone is safe
        places = [size - back for back in _BACK] + ([size - 1] if self._byte_of else [])
        num_open = len(self._text) - self._num_settled
        for place in places:
            text = self._decode(self._window[place:])
            if len(text) > num_open and self._text.endswith(text):
                self._window = self._window[place:]
                self._text, self._num_settled = text, len(text) - num_open
                return
