"""What an encoder-decoder model has beyond a causal one: an encoder, and attention to its output.

The encoder reads a request's source once; the keys and values that each decoder layer makes of its
output are cached per row, in `KVCache.sources`. The decoder's text begins with a token of its own.
Reference: transformers' T5, BART, mBART, Marian, Pegasus and Whisper.
Symbols: S source positions, D hidden size, H heads, d head size.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from transformers import (
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from paceline.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    Source: TypeAlias = Sequence[int] | Tensor  # token ids [S], or features without a batch

# the linear layers of keys and values in transformers' attention modules: T5's names, and the others'
_KEYS_AND_VALUES: Final = (("k", "v"), ("k_proj", "v_proj"))

# tokens, of a source whose encoder has no last position; its attention grows with their square
_LONGEST_SOURCE: Final = 4096


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Return whether a model has an encoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def auto_class_of(config: PreTrainedConfig) -> Any:
    """Return transformers' class that makes a model of a configuration with its output layer."""
    if not getattr(config, "is_encoder_decoder", False):
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        return AutoModelForSpeechSeq2Seq
    return AutoModelForSeq2SeqLM


def body_of(model: PreTrainedModel) -> Any:
    """Return the module that runs a model's layers over its text: the decoder, if it has an encoder."""
    return model.get_decoder() if is_encoder_decoder(model) else model.base_model


def num_layers_of(model: PreTrainedModel) -> int:
    """Return the number of layers over a model's text."""
    config: Any = model.config.get_text_config(decoder=True)
    own = getattr(config, "num_decoder_layers", None)  # T5 names its encoder's otherwise
    return int(config.num_hidden_layers if own is None else own)


def inputs_of_body(model: PreTrainedModel, num_source: int = 1) -> dict[str, Tensor]:
    """Return a decoder's other inputs: an encoder's output [1, num_source, D] of zeros.

    Our attention reads the cached source instead, so what the decoder makes of them has no effect.
    """
    if not is_encoder_decoder(model):
        return {}
    head: Any = model.get_output_embeddings()
    shape = (1, num_source, head.weight.shape[1])
    return {"encoder_hidden_states": torch.zeros(shape, dtype=model.dtype, device=model.device)}


@contextmanager
def told_positions(body: nn.Module, positions: Callable[[], Tensor]) -> Iterator[None]:
    """Give a decoder's learned or sinusoidal embedding the positions [N] of packed tokens.

    A decoder counts the positions of its tokens itself, as if they were one row's.
    """
    embedding: Any = getattr(body, "embed_positions", None)
    if embedding is None:
        yield
        return
    before = embedding.__dict__.get("forward")
    embed = embedding.forward

    def forward(*args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        return embed(*args, position_ids=positions().view_as(position_ids), **kwargs)

    embedding.forward = forward
    try:
        yield
    finally:
        if before is None:
            del embedding.__dict__["forward"]
        else:  # another library had replaced it
            embedding.forward = before


class Encoder:
    """A model's encoder, and the layers that make keys and values of its output."""

    def __init__(
        self, model: PreTrainedModel, name: str, cross_attentions: Mapping[int, nn.Module]
    ) -> None:
        """cross_attentions: the module of each decoder layer, by its index, as far as they are found.

        Raises ModelError if there are none, or if no token is named that the decoder begins with.
        """
        if not cross_attentions:
            raise ModelError(
                f"{name}: {type(model).__name__} is not supported: its decoder has attention code of "
                "its own, which does not go through transformers' interface"
            )
        self._encoder: Any = model.get_encoder()
        self._device, self._dtype = model.device, model.dtype
        embedding: Any = model.get_input_embeddings()
        self._num_ids: int = embedding.weight.shape[0]
        self._projections = [
            _keys_and_values(cross_attentions[layer], name) for layer in sorted(cross_attentions)
        ]
        self.start = start_token(model, name)
        parameters = inspect.signature(self._encoder.forward).parameters
        self.feature_shape: tuple[int, int] | None = None  # bins and frames
        if "input_features" in parameters:
            own = self._encoder.config
            self.feature_shape = (own.num_mel_bins, 2 * own.max_source_positions)
        # tokens that it reads at most
        limit = getattr(model.config, "max_position_embeddings", None)
        self.max_source: int = limit or _LONGEST_SOURCE

    @property
    def reads_features(self) -> bool:
        """Whether it reads features of audio instead of tokens."""
        return self.feature_shape is not None

    def encode(self, source: Source) -> Tensor:
        """Return the encoder's final hidden states [S, D] of one source."""
        hidden: Tensor = self._encoder(**self.as_inputs(source)).last_hidden_state
        return hidden[0]

    def as_inputs(self, source: Source) -> dict[str, Tensor]:
        """Return a source as transformers' encoder takes it, in a batch of one."""
        if not self.reads_features:
            return {"input_ids": torch.as_tensor(source, device=self._device)[None]}
        assert isinstance(source, torch.Tensor)
        return {"input_features": source.to(self._device, self._dtype)[None]}

    def random_source(self, num_positions: int, generator: torch.Generator) -> Source:
        """Return a source for checks: random ids, or features of the length that the encoder takes."""
        if self.feature_shape is None:
            length = min(num_positions, self.max_source)
            return torch.randint(self._num_ids, (length,), generator=generator).tolist()
        return torch.randn(self.feature_shape, generator=generator)

    def entries(self, hidden: Tensor) -> list[Tensor]:
        """Return each decoder layer's keys and values [2 * H, S, d] of hidden states [S, D]."""
        entries = []
        for key, value, num_heads in self._projections:
            made = torch.cat((key(hidden), value(hidden)), dim=-1)
            entries.append(made.unflatten(-1, (2 * num_heads, -1)).transpose(0, 1))
        return entries


def _keys_and_values(attention: Any, name: str) -> tuple[nn.Module, nn.Module, int]:
    """Return the layers of an attention's keys and values, and its number of heads."""
    heads = getattr(attention, "n_heads", None) or getattr(attention, "num_heads", None)
    for key, value in _KEYS_AND_VALUES:
        if heads and hasattr(attention, key) and hasattr(attention, value):
            return getattr(attention, key), getattr(attention, value), int(heads)
    raise ModelError(
        f"{name}: {type(attention).__name__}, which attends to the source, has no layers for keys and "
        "values of a known name; this architecture is not supported"
    )


def start_token(model: PreTrainedModel, name: str) -> int:
    """Return the token that the decoder's text begins with, as transformers' `generate` finds it."""
    places = (
        (getattr(model, "generation_config", None), ("decoder_start_token_id", "bos_token_id")),
        (model.config, ("decoder_start_token_id",)),
    )
    for holder, names in places:
        for field in names:
            token = getattr(holder, field, None)
            if isinstance(token, int):
                return token
    raise ModelError(
        f"{name}: its configuration names no decoder_start_token_id, the token that the decoder's text "
        "begins with; add it"
    )
