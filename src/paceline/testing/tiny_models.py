"""Tiny transformers models with random weights: real architectures in a few thousand parameters.

Built from a configuration and a seed, without a file or a download. Weights are drawn wider than for
training, so that the greedy output wanders over the vocabulary instead of repeating one token.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Final

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from paceline.testing import tiny_families
from paceline.testing.tiny_shapes import HEADS, HIDDEN, LAYERS, PLAIN, gpt_shape, llama_shape
from paceline.testing.tokenizers import NUM_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

_STD: Final = 0.25  # of the weights, an order of magnitude more than is usual


def _llama(vocab_size: int, context: int) -> PreTrainedModel:
    """Grouped-query attention: 4 heads share 2 key-value heads."""
    return LlamaForCausalLM(LlamaConfig(**llama_shape(vocab_size, context)))


def _llama3(vocab_size: int, context: int) -> PreTrainedModel:
    """Llama 3's scaled angles and a tied head."""
    shape = llama_shape(vocab_size, context) | {"tie_word_embeddings": True}
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))


def _qwen2(vocab_size: int, context: int) -> PreTrainedModel:
    """Biases on queries, keys and values; the second layer has a sliding window of 6 tokens."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            **llama_shape(vocab_size, context),
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
        )
    )


def _qwen3(vocab_size: int, context: int) -> PreTrainedModel:
    """Norms on queries and keys, and heads wider than hidden size / number of heads."""
    return Qwen3ForCausalLM(Qwen3Config(**llama_shape(vocab_size, context), head_dim=16))


def _mistral(vocab_size: int, context: int) -> PreTrainedModel:
    """A sliding window of 6 tokens on every layer."""
    return MistralForCausalLM(
        MistralConfig(**llama_shape(vocab_size, context), head_dim=8, sliding_window=6)
    )


def _gemma2(vocab_size: int, context: int) -> PreTrainedModel:
    """Sliding and full layers in turn, capped attention scores and capped logits."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            **llama_shape(vocab_size, context),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=20.0,
        )
    )


def _gemma3(vocab_size: int, context: int) -> PreTrainedModel:
    """Norms on queries and keys, and other angles on the sliding layer than on the full one."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **llama_shape(vocab_size, context),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


def _phi(vocab_size: int, context: int) -> PreTrainedModel:
    """Rotary positions on a part of each head, biases everywhere, parallel attention and MLP."""
    return PhiForCausalLM(PhiConfig(**llama_shape(vocab_size, context)))


def _opt(vocab_size: int, context: int) -> PreTrainedModel:
    """Learned positions, counted from 2."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            ffn_dim=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=context,
            word_embed_proj_dim=HIDDEN,
            **PLAIN,
        )
    )


def _gpt2(vocab_size: int, context: int) -> PreTrainedModel:
    """Learned positions and fused query-key-value weights."""
    return GPT2LMHeadModel(GPT2Config(**gpt_shape(vocab_size, context)))


def _gpt_neox(vocab_size: int, context: int) -> PreTrainedModel:
    """Rotary positions on a part of each head, and parallel attention and MLP."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=context,
            **PLAIN,
        )
    )


_BUILDERS: Final[dict[str, Callable[[int, int], PreTrainedModel]]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "llama3": _llama3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi": _phi,
    "opt": _opt,
}
ARCHITECTURES: Final = tuple(_BUILDERS)
FAMILIES: Final = tuple(tiny_families.BUILDERS)  # tested less widely
LEAN_ARCHITECTURES: Final = ("llama", "llama3", "mistral", "qwen2", "qwen3")


def tiny_model(
    architecture: str = "llama",
    seed: int = 1,
    vocab_size: int = NUM_TOKENS,
    context: int = 128,
    std: float = _STD,
) -> PreTrainedModel:
    """Build a random model of `ARCHITECTURES` or `FAMILIES` in float32, without a stop token.

    context: positions it can hold. std: of the weights; the wider, the less flat its distributions.
    The default vocabulary is that of `byte_tokenizer`. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = (_BUILDERS | tiny_families.BUILDERS)[architecture]
        model = build(vocab_size, context)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # vectors are biases and norms
                    parameter.normal_(std=std)
                elif architecture in FAMILIES:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.float().eval()  # type: ignore[no-untyped-call]
    return model


def perturbed(model: PreTrainedModel, amount: float, seed: int = 0) -> PreTrainedModel:
    """A copy whose weights are off by `amount` of their own spread: a drafter that is often right."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                off = torch.randn(parameter.shape, generator=generator) * parameter.std()
                parameter.add_(off, alpha=amount)
    return other
