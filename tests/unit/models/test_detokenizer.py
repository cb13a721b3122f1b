"""The detokenizer decodes as its tokenizer does, whether or not the tokenizer has code of its own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from paceline.models.detokenizer import Detokenizer
from paceline.testing.tokenizers import EOS, byte_tokenizer

TEXT = "naïve café " + EOS


class Loud(PreTrainedTokenizerFast):
    def decode(self, *given: Any, **named: Any) -> str:
        return str(super().decode(*given, **named)).upper()


class Quiet(PreTrainedTokenizerFast):
    def _decode(self, *given: Any, **named: Any) -> str:
        return str(super()._decode(*given, **named)).lower()


def test_a_tokenizer_decodes_as_transformers_does() -> None:
    plain = byte_tokenizer()
    backend, ids = plain.backend_tokenizer, plain.encode(TEXT)
    for tokenizer in (
        plain,
        Loud(tokenizer_object=backend, eos_token=EOS),
        Quiet(tokenizer_object=backend, eos_token=EOS),
    ):
        detokenizer = Detokenizer.of(tokenizer)
        for skips, decode in ((True, detokenizer.decode), (False, detokenizer.spell)):
            expected = tokenizer.decode(
                ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False
            )
            assert decode(tuple(ids)) == expected
    assert Detokenizer.of(plain).decode(ids) == TEXT.removesuffix(EOS)
