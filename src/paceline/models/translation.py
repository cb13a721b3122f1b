"""Between two tokenizers: what text a token stands for, which tokens both have, and text from one
into the tokens of the other.

Tokens are compared by their bytes, so a byte-level "Ġthe" and a SentencePiece "▁the" are one token.
Nothing here raises on text that does not come out even: it is given up, which costs a drafter its
acceptance and nobody a text. Symbols: V = ids of a tokenizer.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.models.vocabulary import Tokenizer

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LEFT: Final = 24  # bytes of text before a piece that its segmentation may depend on
_SHORTEST, _LONGEST = 64, 256  # bytes of a piece that is encoded on its own
_BLANKS: Final = b" \n\t\r"
# Text of several kinds, to see how alike two tokenizers cut it.
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
        specials = {int(i): t.content for i, t in tokenizer.added_tokens_decoder.items()}
        self.special: dict[int, str] = {  # id -> content; their text is not part of an answer's
            i: content
            for i, content in specials.items()
            if tokenizer.added_tokens_decoder[i].special
        }
        self.of: list[bytes] = [b""] * self.num_tokens
        read = _reader(tokenizer)
        for token, i in tokenizer.get_vocab().items():
            if i not in self.special:
                self.of[i] = specials[i].encode() if i in specials else read(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the special tokens that begin or end a whole one."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def first(self) -> list[int]:
        """What the tokenizer puts before every text: its beginning-of-text token, or nothing."""
        bos = self.tokenizer.bos_token_id
        ids: list[int] = self.tokenizer("")["input_ids"]
        return [int(bos)] if bos is not None and ids[:1] == [bos] else []

    def join(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.of[i] if 0 <= i < self.num_tokens else b"" for i in ids)

    def behind(self, before: bytes, text: bytes) -> list[int] | None:
        """Ids of `text` where it follows `before`, ids whose bytes are exactly its own.

        None where there are none: the text is not whole characters, a normaliser changed it, or the
        tokenizer cannot say it. A token that would reach across the border is cut there.
        """
        before = before[-_LEFT:]
        before = before[_whole_from(before) :]
        for left in (before, b"") if before else (b"",):
            try:
                ids = self.encode((left + text).decode())
            except UnicodeDecodeError:
                continue
            found = self._from(ids, left, text)
            if found is not None:
                return found
        return None

    def _from(self, ids: list[int], left: bytes, text: bytes) -> list[int] | None:
        """The end of `ids`, which encode left + text, that has exactly the bytes of `text`."""
        whole = self.join(ids)
        # SentencePiece begins a text with a blank of its own
        extra = len(whole) - len(left) - len(text)
        if extra not in (0, 1) or whole[extra:] != left + text:
            return None
        at = 0
        for place, i in enumerate(ids):
            if at == extra + len(left):
                return ids[place:]
            at += len(self.of[i])
        # the blank may be a part of the first token: at the beginning of a text that is how it is
        return None if text else []

    def pieces(self, text: bytes, start: int = 0) -> Iterator[tuple[int, int]]:
        """[start, stop) of the parts of a text that are encoded one by one, a function of it alone.

        All but the last stay as they are however the text goes on, so only the last is encoded
        again. They end before a blank where tokenizers cut anyway, or at _LONGEST.
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
        """Ids of a part of a text, for a model that is to read it: the best there are, always some."""
        piece = text[start:stop]
        before = text[max(0, start - _LEFT) : start]
        if before:
            ids = self.behind(before, piece)
            if ids is not None:
                return ids
        return self.encode(piece.decode(errors="replace"))


def _cut(text: bytes, start: int) -> int | None:
    """Where the piece that begins at `start` ends for good; None if that is not yet known."""
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
    """Where the first whole character of a text that was cut anywhere begins."""
    return next((i for i, byte in enumerate(text) if byte & 0xC0 != 0x80), len(text))


def split_incomplete(text: bytes) -> tuple[bytes, bytes]:
    """(text, the beginning of a character at its end that is not complete yet)."""
    for length in range(1, min(3, len(text)) + 1):
        byte = text[-length]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return (text[:-length], text[-length:]) if needed > length else (text, b"")
    return text, b""


def _reader(tokenizer: Tokenizer) -> Any:
    """A function from a token's string to its bytes, by what the tokenizer's decoder does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    described = json.dumps(decoder)
    if '"ByteLevel"' in described:
        bytes_of = {character: byte for byte, character in enumerate(byte_characters())}

        def read(token: str) -> bytes:
            if all(c in bytes_of for c in token):
                return bytes(bytes_of[c] for c in token)
            return token.encode()

        return read
    if '"WordPiece"' in described:
        return lambda token: (token[2:] if token.startswith("##") else " " + token).encode()

    def read_sentencepiece(token: str) -> bytes:
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    return read_sentencepiece


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, in the bytes' order.

    Printable bytes stand for themselves, the others for characters from 256 on (GPT-2's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def special_pairs(target: TokenBytes, other: TokenBytes) -> dict[int, int]:
    """Special tokens of the target that the other has too: of equal text, or of equal office."""
    by_content = {content: i for i, content in other.special.items()}
    pairs = {i: by_content[c] for i, c in target.special.items() if c in by_content}
    for office in ("bos_token_id", "eos_token_id"):
        mine = getattr(target.tokenizer, office)
        theirs = getattr(other.tokenizer, office)
        if mine is not None and theirs is not None:
            pairs.setdefault(mine, theirs)
    return pairs


def shared_tokens(target: TokenBytes, other: TokenBytes) -> dict[int, int]:
    """Target id -> the other's id, of the tokens both have; no id stands on either side twice."""
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    by_bytes: dict[bytes, int] = {}
    for i in range(other.num_tokens - 1, -1, -1):
        if other.of[i]:
            by_bytes[other.of[i]] = i
    for mine, theirs in special_pairs(target, other).items():
        if theirs not in taken:
            pairs[mine] = theirs
            taken.add(theirs)
    for i, text in enumerate(target.of):
        if text in by_bytes and i not in pairs and by_bytes[text] not in taken:
            pairs[i] = by_bytes[text]
            taken.add(by_bytes[text])
    return pairs


class Readings:
    """For every target id the other's ids that a model reads in its place, at least one."""

    def __init__(self, target: TokenBytes, other: TokenBytes, pairs: dict[int, int]) -> None:
        """pairs: what both have, from `shared_tokens`."""
        self._target, self._other = target, other
        self._by_bytes = {text: i for i, text in reversed(list(enumerate(other.of))) if text}
        self._found: dict[int, tuple[int, ...]] = {t: (own,) for t, own in pairs.items()}
        unknown = other.tokenizer.unk_token_id
        self._blank = unknown if unknown is not None else self._by_bytes.get(b" ", 0)

    def of(self, token: int) -> tuple[int, ...]:
        found = self._found.get(token)
        if found is None:
            text = self._target.of[token] if token < self._target.num_tokens else b""
            found = self._found[token] = tuple(self._cut(text)) or (self._blank,)
        return found

    def _cut(self, text: bytes) -> Sequence[int]:
        """Of a text that stands in a token the other lacks, or has under an id already taken."""
        if not text:
            return []
        if text in self._by_bytes:
            return [self._by_bytes[text]]
        own = self._other.behind(b"", text)
        if own is None:
            # part of a character, or a tokenizer that begins every text with a blank
            own = [self._by_bytes[bytes([b])] for b in text if bytes([b]) in self._by_bytes]
        return own


class RunningText:
    """One growing text of target ids as the other's ids: only its last part is encoded again.

    What it gives is a function of the text alone, however often it was asked on the way.
    """

    def __init__(self, target: TokenBytes, other: TokenBytes, specials: dict[int, int]) -> None:
        """specials: the target's special tokens that the other has too, from `special_pairs`."""
        self._target, self._other, self._specials = target, other, specials
        self._num_read = 0
        self._closed = other.first()  # ids that stay
        self._open: list[int] = []
        self._start = 0  # of the open part in `text`
        self.text = b""  # since the last special token
        self.held = b""  # the beginning of a character at its end, which the other has yet to read

    @property
    def num_closed(self) -> int:
        """How many of its ids stay, however the text goes on."""
        return len(self._closed)

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Ids of a text that has grown to these tokens."""
        pending: list[bytes] = []
        for token in tokens[self._num_read :]:
            if token in self._target.special:
                self._take(b"".join(pending))
                pending = []
                self._close(token)
            elif token < self._target.num_tokens:
                pending.append(self._target.of[token])
        self._num_read = len(tokens)
        self._take(b"".join(pending))
        return [*self._closed, *self._open]

    def _take(self, text: bytes) -> None:
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
        self._closed += self._open
        own = self._specials.get(token)
        # a beginning of text that the other's tokenizer has put there already
        if own is not None and self._closed != [own]:
            self._closed.append(own)
        self._open, self._start, self.text, self.held = [], 0, b"", b""


def share_of_vocabulary(target: TokenBytes, other: TokenBytes) -> float:
    """How many of the smaller vocabulary's tokens both have, as a share."""
    sizes = [sum(map(bool, side.of)) + len(side.special) for side in (target, other)]
    return len(shared_tokens(target, other)) / max(1, min(sizes))


def share_cut_alike(target: TokenBytes, other: TokenBytes) -> float:
    """The share of the target's tokens in texts of several kinds that the other cuts out too."""
    same = total = 0
    for probe in _PROBES:
        mine, theirs = (_spans(side, probe) for side in (target, other))
        same += len(mine & theirs)
        total += len(mine)
    return same / max(1, total)


def _spans(side: TokenBytes, text: str) -> set[tuple[int, int]]:
    """[start, stop) of every token in bytes, counted from the text's end.

    A blank that a tokenizer puts before a text lies outside of it.
    """
    ids = side.encode(text)
    at, first = -len(side.join(ids)), -len(text.encode())
    spans = set()
    for i in ids:
        spans.add((max(at, first), at + len(side.of[i])))
        at += len(side.of[i])
    return spans
