"""Token ids to text, with the facts about a tokenizer that text decoded token by token depends on.

A *byte token* is one byte of a byte-fallback vocabulary (`<0xE2>`). A run of them is decoded as UTF-8 if
it is valid, else as one U+FFFD per byte, so its text is final only when the run has ended. A *silent* id
leaves no text: a special token, or an id that no token has. Knows no engine.
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
    """Two decoders of one tokenizer: `decode` omits special tokens, `spell` writes their names.

    special: names of special tokens by id. byte_of: the byte of each byte token. holes: ids below
    num_ids that no token has. num_ids: all ids from here on are silent; None if unknown.
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
        # in some vocabularies such a name is plain text and decodes as itself
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
        """Make a detokenizer of a plain function, without special and byte tokens."""
        return decode if isinstance(decode, Detokenizer) else cls(decode, decode)

    def __call__(self, tokens: Sequence[int]) -> str:
        return self.decode(tokens)

    def is_silent(self, token: int) -> bool:
        """Return whether the token leaves no text in `decode`."""
        return (
            token in self.special
            or token in self.holes
            or (self.num_ids is not None and not 0 <= token < self.num_ids)
        )
