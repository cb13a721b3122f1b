"""How a model reads a request: a causal one its prompt and output, one with an encoder the prompt first.

Everywhere else a request's tokens are its prompt and its output, whoever reads the prompt.
Symbols: S source positions, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.encoder_decoder import Encoder, Source
    from paceline.models.interfaces import KVCache


class Reading:
    """The texts of a model, and the sources of its rows; base of `LanguageModel`."""

    encoder: Encoder | None
    context_length: int
    cache: KVCache

    @property
    def reads_prompt_as_source(self) -> bool:
        """Whether an encoder reads a request's prompt, and the decoder's text begins without it."""
        return self.encoder is not None and not self.encoder.reads_features

    def text_of(self, tokens: Sequence[int], num_prompt: int) -> Sequence[int]:
        """Return the model's text of a request's prompt and output: what `forward` is fed.

        num_prompt: leading tokens that are the prompt.
        """
        if self.encoder is None or self.encoder.reads_features:
            return tokens
        return [self.encoder.start, *tokens[num_prompt:]]

    def start_of(self, prompt: Sequence[int]) -> Sequence[int] | None:
        """Return what the model's text of a request begins with, None if that is the prompt."""
        return self.text_of(prompt, len(prompt)) if self.reads_prompt_as_source else None

    def num_before_output(self, num_prompt: int) -> int:
        """Return the tokens of the model's text before the output, for a prompt of this many."""
        return 1 if self.reads_prompt_as_source else num_prompt

    @property
    def max_prompt(self) -> int:
        """Maximum number of tokens of a prompt."""
        if self.encoder is None or self.encoder.reads_features:
            return self.context_length
        return self.encoder.max_source

    def begin(self, slot: int, source: Source, cache: KVCache | None = None) -> Tensor:
        """Read the source of a new row; return the encoder's final hidden states [S, D].

        For models with an encoder, once per row and before its first forward. source: token ids, or
        the features that the encoder takes. cache: None for the model's own.
        """
        assert self.encoder is not None
        cache = self.cache if cache is None else cache
        assert cache.sources is not None
        hidden = self.encoder.encode(source)
        cache.sources.forget(slot)
        cache.sources.write(slot, 0, self.encoder.entries(hidden))
        return hidden

    def has_room_after(self, num_prompt: int) -> bool:
        """Return whether a prompt of this many tokens leaves room for more than one token of answer."""
        if self.reads_prompt_as_source:
            return num_prompt <= self.max_prompt
        return num_prompt < self.context_length
