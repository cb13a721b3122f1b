"""Students with an encoder: a small T5, or a copy of an encoder-decoder target's layers.

A new one is a T5 of version 1.1 (gated GELU, no biases, relative positions) whose embedding is its
output layer, with the target's vocabulary and start token. Knows no data and no training.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from transformers import T5Config

from paceline.errors import ConfigError
from paceline.models.encoder_decoder import num_layers_of
from paceline.models.sublayers import find_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from paceline.distillation.settings import StudentShape

# fields of transformers' configurations, in T5's family and in BART's
_NUM_LAYERS: Final = {
    "decoder": ("num_decoder_layers", "decoder_layers"),
    "encoder": ("num_layers", "encoder_layers"),
}
_T5_FAMILY: Final = ("t5", "mt5", "umt5")
_SHARING_A_BIAS: Final = ("t5", "mt5")  # the first layer's relative positions are those of all


def t5_config(shape: StudentShape, vocab_size: int, start: int, **ids: int | None) -> T5Config:
    """Return a T5's configuration. start: of the decoder's text; ids: `eos_token_id` and others."""
    make: Any = T5Config  # which takes fields that it does not declare
    config: T5Config = make(
        vocab_size=vocab_size,
        d_model=shape.hidden_size,
        d_kv=shape.hidden_size // shape.num_heads,
        d_ff=shape.mlp_size,
        num_layers=shape.encoder_layers,
        num_decoder_layers=shape.num_layers,
        num_heads=shape.num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=start,
        **ids,
    )
    return config


def check_t5_shape(shape: StudentShape) -> None:
    """Raise ConfigError for a shape that no T5 has."""
    if shape.num_kv_heads != shape.num_heads:
        raise ConfigError(
            f"num_kv_heads {shape.num_kv_heads}: a T5 has as many as num_heads, {shape.num_heads}; "
            "remove it"
        )
    _check_depths(shape.num_layers, shape.encoder_layers)


def _check_depths(num_layers: int, num_encoder_layers: int) -> None:
    """Raise ConfigError for a T5 that transformers cannot run: its cache has the encoder's layers."""
    if num_layers > num_encoder_layers:
        raise ConfigError(
            f"{num_layers} decoder layers and {num_encoder_layers} encoder layers: transformers' "
            "`generate` needs a T5's encoder to have at least as many; add layers to the encoder"
        )


def copy_encoder_decoder_layers(
    target: PreTrainedModel,
    decoder_layers: Sequence[int] | None,
    encoder_layers: Sequence[int] | None,
) -> PreTrainedModel:
    """Return a float32 copy of the target with these layers, in this order; None copies all.

    Raises ConfigError for an index that the target does not have, and for a T5 whose decoder would be
    deeper than its encoder.
    """
    student = copy.deepcopy(target).float().cpu()
    if decoder_layers is not None:
        _keep_layers(student, "decoder", "target_layers", decoder_layers)
    if encoder_layers is not None:
        _keep_layers(student, "encoder", "target_encoder_layers", encoder_layers)
    if student.config.model_type in _T5_FAMILY:
        _check_depths(num_layers_of(student), student.config.num_hidden_layers)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    return student


def _keep_layers(student: PreTrainedModel, part: str, setting: str, indices: Sequence[int]) -> None:
    """Replace the layers of a model's encoder or decoder by copies of some of them."""
    config: Any = student.config
    stack: Any = student.get_decoder() if part == "decoder" else student.get_encoder()
    total = num_layers_of(student) if part == "decoder" else config.num_hidden_layers
    if bad := [i for i in indices if i >= total]:
        raise ConfigError(f"{setting}: {bad[0]} is not one of the target's {total} {part} layers")
    owner, attribute = find_layers(stack, total, "the target")
    layers: Any = getattr(owner, attribute)
    chosen = nn.ModuleList(copy.deepcopy(layers[i]) for i in indices)
    for place, layer in enumerate(chosen):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = place  # type: ignore[assignment]  # of the KV cache
    if config.model_type in _SHARING_A_BIAS:
        _give_bias_to_first(layers[0].layer[0].SelfAttention, chosen)
    setattr(owner, attribute, chosen)
    name = next(name for name in _NUM_LAYERS[part] if hasattr(config, name))
    setattr(config, name, len(indices))
    if stack.config is not config:  # T5's encoder and decoder have their own
        stack.config.num_layers = len(indices)


def _give_bias_to_first(source: Any, chosen: Any) -> None:
    """Give the first of the chosen layers the biases that all layers of a T5 share."""
    for place, layer in enumerate(chosen):
        attention = layer.layer[0].SelfAttention
        attention.has_relative_attention_bias = place == 0
        if place == 0:
            attention.relative_attention_bias = copy.deepcopy(source.relative_attention_bias)
        elif hasattr(attention, "relative_attention_bias"):
            del attention.relative_attention_bias
