"""Translation between two tokenizers: the bytes of each token, shared tokens, and text re-encoded.

Tokens are compared by their bytes, so a byte-level "Ġthe" and a SentencePiece "▁the" are one token.
Text that the other tokenizer cannot encode exactly raises no error: its draft is dropped, which costs
acceptance and never changes a text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.models.vocabulary import Tokenizer

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTEXT: Final = 24  # bytes of text before a piece that its tokens may depend on
_SHORTEST, _LONGEST = 64, 256  # bytes of a piece that is encoded on its own
_BLANKS: Final = b" \n\t\r"
# Texts of several kinds, on which the cuts of two tokenizers are compared.
_PROBES: Final = (
    "The quick brown fox jumps over the lazy dog, and nobody was particularly surprised by it.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0\n",
    "Question: a shop sells 3 apples for 1.25 each. What do 12 apples cost?\nAnswer: 12 * 1.25 = 15",
    "Der Zug nach München fährt um 17:45 Uhr ab; là-bas, il fait déjà nuit et il pleut.",
    '{"name": "value", "list": [1, 2, 3], "nested": {"key": null, "url": "https://example.com"}}',
)


class TokenBytes:
    """A tokenizer as a map between token ids and bytes of text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = max(tokenizer.get_vocab().values()) + 1
        added = tokenizer.added_tokens_decoder
        # id -> content; their text is not part of an answer's
        self.special: dict[int, str] = {i: t.content for i, t in added.items() if t.special}
        self.of: list[bytes] = [b""] * self.num_tokens  # by id; special tokens have none
        bytes_of = _bytes_of_token(tokenizer)
        for token, i in tokenizer.get_vocab().items():
            if i not in self.special:
                self.of[i] = added[i].content.encode() if i in added else bytes_of(token)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens at its beginning and end."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def first(self) -> list[int]:
        """Return the beginning-of-text token if the tokenizer puts it before every text, else []."""
        bos = self.tokenizer.bos_token_id
        ids: list[int] = self.tokenizer("")["input_ids"]
        return [int(bos)] if bos is not None and ids[:1] == [bos] else []

    def join(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids; ids without a token have none."""
        return b"".join(self.of[i] if 0 <= i < self.num_tokens else b"" for i in ids)

    def encode_after(self, before: bytes, text: bytes) -> list[int] | None:
        """Return ids with exactly the bytes of `text` if it follows `before`, or None.

        None if the text does not consist of whole characters, a normaliser changes it, or the
        tokenizer has no tokens for it. A token that would cross the border is cut there.
        """
        before = before[-_CONTEXT:]
        before = before[_whole_from(before) :]
        for context in (before, b"") if before else (b"",):
            try:
                ids = self.encode((context + text).decode())
            except UnicodeDecodeError:
                continue
            ending = self._ending(ids, context, text)
            if ending is not None:
                return ending
        return None

    def _ending(self, ids: list[int], context: bytes, text: bytes) -> list[int] | None:
        """Return the last of `ids`, which encode context + text, with exactly the bytes of `text`."""
        whole = self.join(ids)
        # SentencePiece begins a text with an additional blank
        extra = len(whole) - len(context) - len(text)
        if extra not in (0, 1) or whole[extra:] != context + text:
            return None
        at = 0
        for place, i in enumerate(ids):
            if at == extra + len(context):
                return ids[place:]
            at += len(self.of[i])
        # at the beginning of a text the blank may be a part of the first token
        return None if text else []

    def pieces(self, text: bytes, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield [start, stop) of the pieces of a text that are encoded one by one.

        All but the last stay the same however the text continues, so only the last is encoded
        again. A piece ends before a blank, where tokenizers cut anyway, or at _LONGEST.
        """
        while len(text) - start > _SHORTEST:
            stop = _cut(text, start)
            if stop is None:
                break
            yield start, stop
            start = stop
        if start < len(text):
            yield start, len(text)

    def read(self, text: bytes, start: int, stop: int) -> list[int]:
        """Return the ids of a piece of a text, for a model that reads it; exact if possible."""
        piece = text[start:stop]
        before = text[max(0, start - _CONTEXT) : start]
        ids = self.encode_after(before, piece) if before else None
        return self.encode(piece.decode(errors="replace")) if ids is None else ids


def _cut(text: bytes, start: int) -> int | None:
    """Return the final end of the piece that begins at `start`, or None if it is not known yet."""
    for stop in range(start + _SHORTEST, min(len(text), start + _LONGEST)):
        if text[stop] in _BLANKS and text[stop - 1] not in _BLANKS:
            return stop
    stop = start + _LONGEST
    if len(text) <= stop:
        return None
    while stop > start + _SHORTEST and text[stop] & 0xC0 == 0x80:  # inside a character
        stop -= 1
    return stop


def _whole_from(text: bytes) -> int:
    """Return the place of the first whole character of a text that was cut anywhere."""
    return next((i for i, byte in enumerate(text) if byte & 0xC0 != 0x80), len(text))


def split_incomplete(text: bytes) -> tuple[bytes, bytes]:
    """Return a text without an incomplete character at its end, and the bytes of that character."""
    for length in range(1, min(3, len(text)) + 1):
        byte = text[-length]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return (text[:-length], text[-length:]) if needed > length else (text, b"")
    return text, b""


def _bytes_of_token(tokenizer: Tokenizer) -> Any:
    """Return the function from a token's string to its bytes that fits the tokenizer's decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    described = json.dumps(decoder)
    if '"ByteLevel"' in described:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}

        def from_byte_level(token: str) -> bytes:
            if all(c in byte_of for c in token):
                return bytes(byte_of[c] for c in token)
            return token.encode()

        return from_byte_level
    if '"WordPiece"' in described:
        return lambda token: (token[2:] if token.startswith("##") else " " + token).encode()

    def from_sentencepiece(token: str) -> bytes:
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    return from_sentencepiece


def byte_characters() -> list[str]:
    """Return the character of each byte in byte-level vocabularies (GPT-2's table), by byte."""
    characters: dict[int, str] = bytes_to_unicode()
    return [characters[byte] for byte in range(256)]


def special_pairs(target: TokenBytes, other: TokenBytes) -> dict[int, int]:
    """Return target id -> the other's id of special tokens with equal text or equal role."""
    by_content = {content: i for i, content in other.special.items()}
    pairs = {i: by_content[c] for i, c in target.special.items() if c in by_content}
    for role in ("bos_token_id", "eos_token_id"):
        mine, theirs = getattr(target.tokenizer, role), getattr(other.tokenizer, role)
        if mine is not None and theirs is not None:
            pairs.setdefault(mine, theirs)
    return pairs


def shared_tokens(target: TokenBytes, other: TokenBytes) -> dict[int, int]:
    """Return target id -> the other's id of the tokens that both have; each id occurs once."""
    by_bytes = _ids_by_bytes(other)
    equal = ((i, by_bytes[text]) for i, text in enumerate(target.of) if text in by_bytes)
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for mine, theirs in (*special_pairs(target, other).items(), *equal):
        if mine not in pairs and theirs not in taken:
            pairs[mine] = theirs
            taken.add(theirs)
    return pairs


def _ids_by_bytes(side: TokenBytes) -> dict[bytes, int]:
    """Return the lowest id of each text; special tokens have none."""
    return {text: i for i, text in reversed(list(enumerate(side.of))) if text}


class TokenTranslation:
    """A map from each target id to the other's ids that a model reads in its place, at least one."""

    def __init__(self, target: TokenBytes, other: TokenBytes, pairs: dict[int, int]) -> None:
        """pairs: the shared tokens, from `shared_tokens`."""
        self._target, self._other = target, other
        self._by_bytes = _ids_by_bytes(other)
        self._known: dict[int, tuple[int, ...]] = {t: (own,) for t, own in pairs.items()}
        unknown = other.tokenizer.unk_token_id
        self._blank = unknown if unknown is not None else self._by_bytes.get(b" ", 0)

    def of(self, token: int) -> tuple[int, ...]:
        """Return the other's ids for a target id."""
        ids = self._known.get(token)
        if ids is None:
            text = self._target.of[token] if token < self._target.num_tokens else b""
            ids = self._known[token] = tuple(self._encode(text)) or (self._blank,)
        return ids

    def _encode(self, text: bytes) -> Sequence[int]:
        """Return the other's ids for the text of a token that is not shared; maybe none."""
        if not text:
            return []
        if text in self._by_bytes:
            return [self._by_bytes[text]]
        own = self._other.encode_after(b"", text)
        if own is None:
            # part of a character, or a tokenizer that begins every text with a blank
            own = [self._by_bytes[bytes([b])] for b in text if bytes([b]) in self._by_bytes]
        return own


class RunningText:
    """A growing text of target ids as the other's ids; only its last piece is encoded again.

    The ids depend on the text alone, not on the calls in between.
    """

    def __init__(self, target: TokenBytes, other: TokenBytes, specials: dict[int, int]) -> None:
        """specials: special tokens that both have, from `special_pairs`."""
        self._target, self._other, self._specials = target, other, specials
        self._num_read = 0
        self._closed = other.first()  # ids that stay
        self._open: list[int] = []
        self._start = 0  # of the open piece in `text`
        self.text = b""  # since the last special token
        self.held = b""  # an incomplete character at its end, which is not in the ids

    @property
    def num_closed(self) -> int:
        """Number of ids that stay, however the text continues."""
        return len(self._closed)

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Return the ids of a text that has grown to these tokens."""
        pending: list[bytes] = []
        for token in tokens[self._num_read :]:
            if token in self._target.special:
                self._append(b"".join(pending))
                pending = []
                self._close(token)
            elif token < self._target.num_tokens:
                pending.append(self._target.of[token])
        self._num_read = len(tokens)
        self._append(b"".join(pending))
        return [*self._closed, *self._open]

    def _append(self, text: bytes) -> None:
        """Append text that holds no special token."""
        if not text:
            return
        self.text += text
        whole, self.held = split_incomplete(self.text)
        *closed, (start, stop) = self._other.pieces(self.text, self._start)
        for piece in closed:
            self._closed += self._other.read(self.text, *piece)
        self._start = start
        self._open = self._other.read(self.text, start, min(stop, len(whole)))

    def _close(self, token: int) -> None:
        """Append a special token, which ends the open piece."""
        self._closed += self._open
        own = self._specials.get(token)
        # the other's tokenizer has put a beginning-of-text token there already
        if own is not None and self._closed != [own]:
            self._closed.append(own)
        self._open, self._start, self.text, self.held = [], 0, b"", b""


def share_of_vocabulary(target: TokenBytes, other: TokenBytes) -> float:
    """Return the number of shared tokens per token of the smaller vocabulary."""
    sizes = [sum(map(bool, side.of)) + len(side.special) for side in (target, other)]
    return len(shared_tokens(target, other)) / max(1, min(sizes))


def share_cut_alike(target: TokenBytes, other: TokenBytes) -> float:
    """Return the share of the target's tokens in texts of several kinds that the other cuts alike."""
    same = total = 0
    for probe in _PROBES:
        mine, theirs = (_spans(side, probe) for side in (target, other))
        same += len(mine & theirs)
        total += len(mine)
    return same / max(1, total)


def _spans(side: TokenBytes, text: str) -> set[tuple[int, int]]:
    """Return [start, stop) of every token in bytes, counted from the text's end.

    A blank that a tokenizer puts before a text is outside.
    """
    ids = side.encode(text)
    at, first = -len(side.join(ids)), -len(text.encode())
    spans = set()
    for i in ids:
        spans.add((max(at, first), at + len(side.of[i])))
        at += len(side.of[i])
    return spans
