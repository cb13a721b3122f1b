"""Facts about a model from its configuration alone: support, context length, bytes per position.

`visibility.py` and the self-checks at load find the problems that only a forward shows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from paceline.errors import ModelError
from paceline.models.compiled.family import facts_of
from paceline.models.compiled.weights import GROUP, HEAD_UNIT, PackedModel, rounded
from paceline.models.encoder_decoder import num_layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECURRENT: Final = re.compile(r"mamba|linear|recurrent|conv|rwkv|lstm|ssm|delta|lightning")
# ALiBi and T5's relative positions have no last one: more positions than any cache holds
_ENDLESS: Final = 1 << 20
_WITHOUT_LAST: Final = frozenset({"bloom", "t5", "mt5", "umt5"})


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Return why a model cannot run on packed rows over a key-value cache, or None if its kind can."""
    config: Any = model.config
    recurrent = _recurrent_layers(config.get_text_config())
    if recurrent or getattr(model, "_is_stateful", False):
        layers = f" ({', '.join(recurrent)})" if recurrent else ""
        state = f"a recurrent state in addition to or instead of keys and values{layers}"
        return f"it keeps {state}, which cannot be taken back when a draft is rejected"
    if getattr(config.get_text_config(), "index_topk", None):
        return (
            "an index of its own chooses which tokens each token sees (index_topk), and that index is "
            "not kept per row"
        )
    return None


def _recurrent_layers(config: Any) -> list[str]:
    """Return the layer types of a configuration that keep a recurrent state, each once."""
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple):
            found = dict.fromkeys(str(k) for k in kinds if _RECURRENT.search(str(k)))
            if found:
                return list(found)
    return []


def context_length_of(config: Any) -> tuple[int, str | None]:
    """Return (usable positions, the reason if they are fewer than the model's own).

    config: of the text part. Raises ModelError if it names no length.
    """
    names = (
        "max_position_embeddings",  # most models
        "max_seq_len",  # MPT
        "seq_length",  # Bloom
        "max_target_positions",  # Whisper
    )
    length = next((n for n in (getattr(config, name, None) for name in names) if n), None)
    if length is None and config.model_type in _WITHOUT_LAST:
        length = _ENDLESS
    if length is None or length < 1:
        raise ModelError(
            f"{type(config).__name__} names no context length (max_position_embeddings)"
        )
    # longrope turns every angle once one position passes the original length, for all rows of a
    # forward at once; below it, rows cannot disturb one another
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        original = part.get("original_max_position_embeddings")
        if part.get("rope_type") == "longrope" and original and original < length:
            note = (
                f"its context is cut from {length} to {original} tokens: the model's rope type "
                "'longrope' changes the angles of the whole text beyond them, which is not "
                "supported"
            )
            return int(original), note
        if part.get("rope_type") == "dynamic" and length > 1:
            # the angles of a longer text stay, and only shorter texts clear them
            note = (
                f"its context is cut from {length} to {length - 1} tokens: the model's rope type "
                "'dynamic' keeps the angles of a longer text where one is as long as that"
            )
            return int(length) - 1, note
    return int(length), None


def cache_bytes_per_position(config: Any, dtype: torch.dtype, is_compiled: bool = False) -> int:
    """Return the bytes of one token's keys and values in all layers.

    is_compiled: for the compiled forward, whose cache rounds the head size up.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1  # older Falcon, GPT BigCode
    heads = heads or text.num_attention_heads
    size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    size = size or text.hidden_size // text.num_attention_heads
    rooms = (rounded(size, HEAD_UNIT) + rounded(size, GROUP)) if is_compiled else 2 * size
    layers = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
    return int(layers * heads * rooms * dtype.itemsize)


def count_packed_bytes(model: PreTrainedModel, weights: str) -> int:
    """Return the bytes of the copy of a model's weights that the compiled forward makes.

    model: fits the compiled forward; only shapes and dtype are used, and its weights and buffers are
    lost. weights: `own` or `int8`.
    """
    kind = str(model.dtype).removeprefix("torch.") if weights == "own" else weights
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                module._parameters[key] = nn.Parameter(shape, False)
        for key, buffer in module._buffers.items():
            if buffer is not None:  # small, and read while the weights are packed
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    windows = dict.fromkeys(range(num_layers_of(model)))
    return PackedModel(*facts_of(model, windows, 1), kind, inputs=kind).num_bytes
