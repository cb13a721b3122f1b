"""Tiny transformers models with random weights: real architectures in a few thousand parameters.

Built from a configuration and a seed, without a file or a download. Weights are drawn wider than for
training, so that the greedy text has many different tokens instead of one repeated token.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers as hf
from torch import nn

from paceline.models.encoder_decoder import auto_class_of
from paceline.testing.tokenizers import NUM_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_STD: Final = 0.25  # of the weights, about ten times the usual

# Special ids are None: several architectures' own defaults are outside a small vocabulary.
_PLAIN: Final[dict[str, Any]] = {
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# The sizes in the field names of several architectures.
_SMALL: Final = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_NEOX: Final = {**_SMALL, "intermediate_size": 64}
_LLAMA: Final = {**_NEOX, "num_key_value_heads": 2}
_GPT: Final = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_GRANITE: Final = {
    **_LLAMA,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.4,
    "logits_scaling": 3.0,
}
_EXPERTS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """A model type of transformers and the settings of its tiny configuration."""

    model_type: str
    settings: Mapping[str, Any]
    context: str = "max_position_embeddings"  # the field of the context length


def _of_llama(model_type: str, **settings: Any) -> _Architecture:
    return _Architecture(model_type, {**_LLAMA, **settings})


_ARCHITECTURES: Final = {
    # grouped-query attention: 4 heads share 2 key-value heads
    "llama": _of_llama("llama"),
    # learned positions, fused query-key-value weights
    "gpt2": _Architecture("gpt2", _GPT, "n_positions"),
    # rotary positions on a part of each head, parallel attention and MLP
    "gpt_neox": _Architecture("gpt_neox", _NEOX),
    # a sliding window of 6 tokens on every layer
    "mistral": _of_llama("mistral", head_dim=8, sliding_window=6),
    # alternating sliding and full layers, capped attention scores and capped logits
    "gemma2": _of_llama(
        "gemma2",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=20.0,
    ),
    # Llama 3's scaled angles and a tied head
    "llama3": _of_llama(
        "llama",
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    # biases on queries, keys and values; a sliding window of 6 tokens on the second layer
    "qwen2": _of_llama("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    # norms on queries and keys, heads wider than hidden size / number of heads
    "qwen3": _of_llama("qwen3", head_dim=16),
    # norms on queries and keys, different angles on the sliding and the full layer
    "gemma3": _of_llama(
        "gemma3_text",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    # rotary positions on a part of each head, biases everywhere, parallel attention and MLP
    "phi": _of_llama("phi"),
    # learned positions, counted from 2
    "opt": _Architecture("opt", {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}),
}
# Families with their own code at the logits, in the attention or in its bias. With 6 heads, which is
# no power of two, ALiBi has two series of slopes.
_FAMILIES: Final = {
    # scaled logits of a tied head, norms on queries and keys, parallel attention and MLP
    "cohere": _of_llama("cohere", tie_word_embeddings=True, logit_scale=0.25, use_qk_norm=True),
    # scaled logits; a window of 6 tokens with angles on one layer, neither on the other
    "cohere2": _of_llama(
        "cohere2",
        logit_scale=0.25,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    # multipliers of the embedding, the scores, the residuals and the logits
    "granite": _Architecture("granite", _GRANITE),
    # Granite with two of four experts per token
    "granite_moe": _Architecture("granitemoe", {**_GRANITE, **_EXPERTS}),
    # Granite with two of four experts per token, and one expert for every token
    "granite_moe_shared": _Architecture(
        "granitemoeshared", {**_GRANITE, **_EXPERTS, "shared_intermediate_size": 32}
    ),
    # the newer architecture: groups of heads, rotary positions, two parallel norms
    "falcon": _Architecture(
        "falcon", {**_SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    # the 7B's architecture: one key and one value head for all, rotary positions
    "falcon_multi_query": _Architecture("falcon", {**_SMALL, "multi_query": True}),
    # the RW models' architecture: ALiBi, biases, a key-value head per head, MLP in series
    "falcon_alibi": _Architecture(
        "falcon",
        {
            **_SMALL,
            "hidden_size": 48,
            "num_attention_heads": 6,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    # norms per head on queries and keys, partly rotary heads, parallel attention and MLP
    "stablelm": _of_llama("stablelm", qk_layernorm=True, use_parallel_residual=True),
    # norms with weights around 1, partly rotary heads, a squared ReLU
    "nemotron": _of_llama("nemotron", head_dim=8),
    # rotary positions in interleaved pairs on a part of each head, from a table
    "gptj": _Architecture("gptj", {**_GPT, "rotary_dim": 4}, "n_positions"),
    # GPT-J with fused query-key-value weights in four parts
    "codegen": _Architecture("codegen", {**_GPT, "rotary_dim": 4}, "n_positions"),
    # scores without scaling, a window of 6 tokens on the second layer
    "gpt_neo": _Architecture(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 6,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    # norms after the residuals, learned positions, keys stored in columns
    "gpt1": _Architecture("openai-gpt", _GPT, "n_positions"),
    # rotary positions; one bias, on the output of the last attention
    "gpt_neox_japanese": _Architecture("gpt_neox_japanese", _SMALL),
    # sinusoidal positions counted from 2, a scaled embedding; padding is a row of it
    "xglm": _Architecture(
        "xglm",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "pad_token_id": 0},
    ),
    # ALiBi from the first position, a norm after the embedding, residuals added inside modules
    "bloom": _Architecture("bloom", {"hidden_size": 48, "n_head": 6, "n_layer": 2}, "seq_length"),
    # ALiBi from the last position, clipped queries, keys and values, no biases
    "mpt": _Architecture(
        "mpt",
        {"d_model": 48, "n_heads": 6, "n_layers": 2, "attn_config": {"clip_qkv": 2.0}},
        "max_seq_len",
    ),
}
# Families that the compiled forward runs in addition to those above.
_GATED: Final = {
    # a scaled embedding, norms with weights around 1, a tanh GELU
    "gemma": _of_llama("gemma", head_dim=8, hidden_act="gelu_pytorch_tanh"),
    # Gemma 2 without norms after attention and MLP
    "vaultgemma": _of_llama(
        "vaultgemma",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=20.0,
    ),
    # fused weights, rotary positions on a part of each head, a window of 6 tokens
    "phi3": _of_llama(
        "phi3",
        sliding_window=6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    # angles that change beyond 32 tokens, which cuts the context
    "phi3_long": _of_llama(
        "phi3",
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 32,
        },
    ),
    # no rotary positions on the second layer
    "smollm3": _of_llama("smollm3", no_rope_layers=[1, 0]),
    # norms after attention and MLP only, norms over all queries and all keys of a token
    "olmo2": _of_llama("olmo2"),
    # OLMo 2 with a window of 6 tokens and other angles on the first layer
    "olmo3": _of_llama(
        "olmo3", sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    # norms after attention and MLP only; a window of 6 tokens with angles on one layer, neither on
    # the other
    "exaone4": _of_llama(
        "exaone4", sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    # Granite with norms after attention and MLP, too, and multiplied logits
    "hyperclovax": _Architecture("hyperclovax", _GRANITE),
    # biases on queries, keys and values
    "seed_oss": _of_llama("seed_oss", head_dim=8),
    # a window of 6 tokens on the first layer
    "ministral": _of_llama(
        "ministral",
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cwm": _of_llama(
        "cwm",
        bos_token_id=0,  # None is refused
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
# Models with an encoder. Their decoders begin with the token 0.
_T5: Final = {
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,  # transformers' own cache has no place for a decoder with more
    "num_decoder_layers": 2,
    "num_heads": 4,
}
_BART: Final = {
    "decoder_start_token_id": 0, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "forced_eos_token_id": None, "tie_word_embeddings": True,
    "pad_token_id": 0,  # a row of the embedding
}  # fmt: skip
_FEATURES: Final = {"max_source_positions": 20, "num_mel_bins": 8}
_ENCODER_DECODERS: Final = {
    # one relative position bias for all layers, a plain ReLU, a tied head and scaled logits
    "t5": _Architecture("t5", {**_T5, "feed_forward_proj": "relu", "tie_word_embeddings": True}),
    # one bias for all layers, a gated tanh GELU, a head of its own
    "mt5": _Architecture("mt5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    # a bias per layer, a gated tanh GELU, scaled logits
    "umt5": _Architecture("umt5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    # learned positions, norms after the residuals
    "bart": _Architecture("bart", _BART),
    # learned positions, norms before attention and MLP, a scaled embedding
    "mbart": _Architecture("mbart", {**_BART, "scale_embedding": True}),
    # sinusoidal positions
    "marian": _Architecture("marian", _BART),
    "pegasus": _Architecture("pegasus", _BART),
    # an encoder of features
    "whisper": _Architecture("whisper", {**_BART, **_FEATURES}, "max_target_positions"),
}
_UNTIED: Final = frozenset({"mt5"})  # whose configuration ties the head, whatever it is told
_WITHOUT_CONTEXT: Final = frozenset({"t5", "mt5", "umt5"})
ENCODER_DECODERS: Final = tuple(_ENCODER_DECODERS)
ARCHITECTURES: Final = tuple(_ARCHITECTURES)
FAMILIES: Final = tuple(_FAMILIES)  # tested less widely
LEAN_ARCHITECTURES: Final = ("llama", "llama3", "mistral", "qwen2", "qwen3")
COMPILED_ARCHITECTURES: Final = (*LEAN_ARCHITECTURES, "gemma2", "gemma3", "granite", *_GATED)
# the code after their attention does not accept a zero output
WITHOUT_SUBSETS: Final = ("gpt1", "gpt_neox_japanese")


def tiny_model(
    architecture: str = "llama",
    seed: int = 1,
    vocab_size: int = NUM_TOKENS,
    context: int = 128,
    std: float = _STD,
    **settings: Any,
) -> PreTrainedModel:
    """Return a random model of one of the architectures in float32, without a stop token.

    context: number of positions, unless the architecture has no last one. std: of the weights; a larger
    one makes distributions less flat. settings: other fields of the configuration. The default
    vocabulary is that of `byte_tokenizer`. The global random state does not change.
    """
    tiny = (_ARCHITECTURES | _FAMILIES | _GATED | _ENCODER_DECODERS)[architecture]
    sizes = {"vocab_size": vocab_size, tiny.context: context}
    if architecture in _WITHOUT_CONTEXT:
        del sizes[tiny.context]
    config = hf.CONFIG_MAPPING[tiny.model_type](**{**_PLAIN, **sizes, **tiny.settings, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = auto_class_of(config).from_config(config)
        if architecture in _UNTIED:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    continue  # sinusoids
                if parameter.dim() > 1:  # vectors are biases and norms
                    parameter.normal_(std=std)
                elif architecture not in ARCHITECTURES:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_()
    model.float().eval()
    return model  # type: ignore[no-any-return]


def perturbed(model: PreTrainedModel, amount: float, seed: int = 0) -> PreTrainedModel:
    """Return a copy whose weights have noise of `amount` standard deviations: an often right drafter."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator) * parameter.std()
                parameter.add_(noise, alpha=amount)
    return other
