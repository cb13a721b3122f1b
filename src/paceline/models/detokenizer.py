"""Token ids to text; the one place that decodes, for whole texts and token by token.

A *byte token* is one byte of a byte-fallback vocabulary (`<0xE2>`). A run of them is decoded as UTF-8 if
it is valid, else as one U+FFFD per byte, so its text is final only when the run has ended. A *silent* id
has no text: a special token, or an id without a token. Knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from paceline.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.models.vocabulary import Tokenizer

_BYTE_TOKENS: Final = {f"<0x{byte:02X}>": byte for byte in range(256)}
_DECODING: Final = ("decode", "_decode")  # transformers' methods that decode


@dataclass(frozen=True, slots=True)
class Detokenizer:
    """Two decoders of one tokenizer: `decode` omits special tokens, `spell` writes their names.

    special: names of special tokens by id. byte_of: the byte of each byte token. holes: ids below
    num_ids without a token. num_ids: this id and all above are silent; None if unknown.
    """

    decode: Callable[[Sequence[int]], str]
    spell: Callable[[Sequence[int]], str]
    special: Mapping[int, str] = field(default_factory=dict)
    byte_of: Mapping[int, int] = field(default_factory=dict)
    holes: frozenset[int] = frozenset()
    num_ids: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocabulary: Vocabulary | None = None) -> Detokenizer:
        """Return the detokenizer of a tokenizer. vocabulary: read from the tokenizer if None."""
        vocabulary = vocabulary or Vocabulary.of(tokenizer)
        decode = _decoder_of(tokenizer, skip_special=True)
        spell = _decoder_of(tokenizer, skip_special=False)
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
        """Return a detokenizer of a plain function, without special and byte tokens."""
        return decode if isinstance(decode, Detokenizer) else cls(decode, decode)

    def __call__(self, tokens: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return self.decode(tokens)

    def is_silent(self, token: int) -> bool:
        """Return whether the token has no text in `decode`."""
        return (
            token in self.special
            or token in self.holes
            or (self.num_ids is not None and not 0 <= token < self.num_ids)
        )


def _decoder_of(tokenizer: Tokenizer, skip_special: bool) -> Callable[[Sequence[int]], str]:
    """Return the function ids -> text of a tokenizer."""
    from transformers import PreTrainedTokenizerFast as Fast

    own = [getattr(getattr(tokenizer, name, None), "__func__", None) for name in _DECODING]
    if own == [getattr(Fast, name) for name in _DECODING]:
        # the compiled part of that code, which takes a fifth of the time
        return partial(_decode_compiled, tokenizer, skip_special)
    return partial(_decode, tokenizer, skip_special)


def _decode_compiled(tokenizer: Any, skip_special: bool, tokens: Sequence[int]) -> str:
    return str(tokenizer.backend_tokenizer.decode(list(tokens), skip_special))


def _decode(tokenizer: Tokenizer, skip_special: bool, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )
    return str(text)
