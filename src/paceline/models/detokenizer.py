"""Token ids to text, and what of a tokenizer matters to text that grows token by token.

A *byte token* is one byte of a byte-fallback vocabulary (`<0xE2>`): neighbouring ones are read together,
as UTF-8 if all of them are, else as a U+FFFD each, so their text is settled by what follows the last.
A *silent* id leaves no text: special tokens, and ids of padding that no token has. Knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.models.vocabulary import Tokenizer, Vocabulary

_BYTE_TOKENS: Final = {f"<0x{byte:02X}>": byte for byte in range(256)}


@dataclass(frozen=True, slots=True)
class Detokenizer:
    """`decode` leaves special tokens out, as text does; `spell` writes them, for stop strings.

    special: their spelling by id. byte_of: the byte of each byte token. num_ids: ids from here on are
    silent, as `holes` below are; None where that is not known.
    """

    decode: Callable[[Sequence[int]], str]
    spell: Callable[[Sequence[int]], str]
    special: Mapping[int, str] = field(default_factory=dict)
    byte_of: Mapping[int, int] = field(default_factory=dict)
    holes: frozenset[int] = frozenset()
    num_ids: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocabulary: Vocabulary) -> Detokenizer:
        def decode(tokens: Sequence[int]) -> str:
            text = tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return str(text)

        def spell(tokens: Sequence[int]) -> str:
            text = tokenizer.decode(
                list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            return str(text)

        added = tokenizer.added_tokens_decoder.items()
        special = {id for id, token in added if token.special} | set(tokenizer.all_special_ids)
        spelled = {id: spell([id]) for id in special if not decode([id])}
        ids = vocabulary.ids
        known = set(ids.values())
        byte_of = {}
        # a vocabulary may hold such names as plain text: then they read as they are written
        if "<0x41>" in ids and decode([ids["<0x41>"]]) == "A":
            byte_of = {ids[name]: byte for name, byte in _BYTE_TOKENS.items() if name in ids}
        return cls(
            decode,
            spell,
            special={id: text for id, text in spelled.items() if text},
            byte_of=byte_of,
            holes=frozenset(range(vocabulary.num_tokens)) - known,
            num_ids=vocabulary.num_tokens,
        )

    @classmethod
    def wrap(cls, decode: Callable[[Sequence[int]], str]) -> Detokenizer:
        """Of a plain function, in which no token is special and none is a byte."""
        return decode if isinstance(decode, Detokenizer) else cls(decode, decode)

    def __call__(self, tokens: Sequence[int]) -> str:
        return self.decode(tokens)

    def is_silent(self, token: int) -> bool:
        """Whether `decode` passes over the token."""
        return (
            token in self.special
            or token in self.holes
            or (self.num_ids is not None and not 0 <= token < self.num_ids)
        )
