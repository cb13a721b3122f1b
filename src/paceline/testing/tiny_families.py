"""Tiny models of families with code of their own at the logits, in the attention or in its bias.

The builders of `tiny_models.FAMILIES`, in the sizes of its `ARCHITECTURES`. With a number of heads that
is not a power of two, ALiBi has two series of slopes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    MptConfig,
    MptForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StableLmConfig,
    StableLmForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from paceline.testing.tiny_shapes import HEADS, HIDDEN, LAYERS, PLAIN, gpt_shape, llama_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

_ODD_HEADS: Final[dict[str, Any]] = {"hidden": 48, "heads": 6}


def _cohere(vocab_size: int, context: int) -> PreTrainedModel:
    """Scaled logits of a tied head, norms on queries and keys, parallel attention and MLP."""
    shape = llama_shape(vocab_size, context) | {"tie_word_embeddings": True}
    return CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25, use_qk_norm=True))


def _cohere2(vocab_size: int, context: int) -> PreTrainedModel:
    """Scaled logits; a window of 6 tokens with angles on one layer, none of either on the other."""
    return Cohere2ForCausalLM(
        Cohere2Config(
            **llama_shape(vocab_size, context),
            logit_scale=0.25,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


_MULTIPLIERS: Final[dict[str, Any]] = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.4,
    "logits_scaling": 3.0,
}


def _granite(vocab_size: int, context: int) -> PreTrainedModel:
    """Multipliers of the embedding, the scores, the residuals and the logits."""
    return GraniteForCausalLM(GraniteConfig(**llama_shape(vocab_size, context), **_MULTIPLIERS))


_EXPERTS: Final[dict[str, Any]] = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _granite_moe(vocab_size: int, context: int) -> PreTrainedModel:
    """Granite with two of four experts per token."""
    return GraniteMoeForCausalLM(
        GraniteMoeConfig(**llama_shape(vocab_size, context), **_MULTIPLIERS, **_EXPERTS)
    )


def _granite_moe_shared(vocab_size: int, context: int) -> PreTrainedModel:
    """Granite with two of four experts per token, and one for all."""
    return GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            **llama_shape(vocab_size, context),
            **_MULTIPLIERS,
            **_EXPERTS,
            shared_intermediate_size=HIDDEN,
        )
    )


def _falcon_like(vocab_size: int, context: int, **settings: Any) -> PreTrainedModel:
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=vocab_size,
            hidden_size=settings.pop("hidden", HIDDEN),
            num_hidden_layers=LAYERS,
            num_attention_heads=settings.pop("heads", HEADS),
            max_position_embeddings=context,
            **PLAIN,
            **settings,
        )
    )


def _falcon(vocab_size: int, context: int) -> PreTrainedModel:
    """The newer architecture: groups of heads, rotary positions, two norms side by side."""
    return _falcon_like(vocab_size, context, new_decoder_architecture=True, num_kv_heads=2)


def _falcon_multi_query(vocab_size: int, context: int) -> PreTrainedModel:
    """The 7B's architecture: one key and one value head for all, rotary positions."""
    return _falcon_like(vocab_size, context, multi_query=True)


def _falcon_alibi(vocab_size: int, context: int) -> PreTrainedModel:
    """The RW models' architecture: ALiBi, biases, as many key-value heads as heads, MLP in series."""
    own: dict[str, Any] = {
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    }
    return _falcon_like(vocab_size, context, **own, **_ODD_HEADS)


def _stablelm(vocab_size: int, context: int) -> PreTrainedModel:
    """Norms per head on queries and keys, partly rotary heads, parallel attention and MLP."""
    return StableLmForCausalLM(
        StableLmConfig(
            **llama_shape(vocab_size, context), qk_layernorm=True, use_parallel_residual=True
        )
    )


def _nemotron(vocab_size: int, context: int) -> PreTrainedModel:
    """Norms with weights around 1, partly rotary heads, a squared ReLU."""
    return NemotronForCausalLM(NemotronConfig(**llama_shape(vocab_size, context), head_dim=8))


def _gptj(vocab_size: int, context: int) -> PreTrainedModel:
    """Rotary positions in interleaved pairs on a part of each head, from a table."""
    return GPTJForCausalLM(GPTJConfig(**gpt_shape(vocab_size, context), rotary_dim=4))


def _codegen(vocab_size: int, context: int) -> PreTrainedModel:
    """GPT-J with fused query-key-value weights in four parts."""
    return CodeGenForCausalLM(CodeGenConfig(**gpt_shape(vocab_size, context), rotary_dim=4))


def _gpt_neo(vocab_size: int, context: int) -> PreTrainedModel:
    """Scores that are not scaled, and a window of 6 tokens on the second layer."""
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            num_layers=LAYERS,
            num_heads=HEADS,
            max_position_embeddings=context,
            window_size=6,
            attention_types=[[["global", "local"], 1]],
            **PLAIN,
        )
    )


def _gpt1(vocab_size: int, context: int) -> PreTrainedModel:
    """Norms after the residuals, learned positions, keys laid out in columns."""
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**gpt_shape(vocab_size, context)))


def _gpt_neox_japanese(vocab_size: int, context: int) -> PreTrainedModel:
    """Rotary positions and one bias, on the output of the last attention."""
    return GPTNeoXJapaneseForCausalLM(
        GPTNeoXJapaneseConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=context,
            **PLAIN,
        )
    )


def _xglm(vocab_size: int, context: int) -> PreTrainedModel:
    """Sinusoidal positions counted from 2, and a scaled embedding."""
    return XGLMForCausalLM(
        XGLMConfig(
            vocab_size=vocab_size,
            d_model=HIDDEN,
            ffn_dim=2 * HIDDEN,
            num_layers=LAYERS,
            attention_heads=HEADS,
            max_position_embeddings=context,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,  # a row of its embedding
        )
    )


def _bloom(vocab_size: int, context: int) -> PreTrainedModel:
    """ALiBi from the first position, a norm after the embedding, residuals added inside modules."""
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=vocab_size,
            hidden_size=_ODD_HEADS["hidden"],
            n_head=_ODD_HEADS["heads"],
            n_layer=LAYERS,
            **{"seq_length": context, **PLAIN},
        )
    )


def _mpt(vocab_size: int, context: int) -> PreTrainedModel:
    """ALiBi from the last position, clipped queries, keys and values, no biases."""
    return MptForCausalLM(
        MptConfig(
            vocab_size=vocab_size,
            d_model=_ODD_HEADS["hidden"],
            n_heads=_ODD_HEADS["heads"],
            n_layers=LAYERS,
            max_seq_len=context,
            attn_config={"clip_qkv": 2.0},
            **PLAIN,
        )
    )


BUILDERS: Final[dict[str, Callable[[int, int], PreTrainedModel]]] = {
    "cohere": _cohere,
    "cohere2": _cohere2,
    "granite": _granite,
    "granite_moe": _granite_moe,
    "granite_moe_shared": _granite_moe_shared,
    "falcon": _falcon,
    "falcon_multi_query": _falcon_multi_query,
    "falcon_alibi": _falcon_alibi,
    "stablelm": _stablelm,
    "nemotron": _nemotron,
    "gptj": _gptj,
    "codegen": _codegen,
    "gpt_neo": _gpt_neo,
    "gpt1": _gpt1,
    "gpt_neox_japanese": _gpt_neox_japanese,
    "xglm": _xglm,
    "bloom": _bloom,
    "mpt": _mpt,
}
# the code after their attention does not accept a zero output
WITHOUT_SUBSETS: Final = ("gpt1", "gpt_neox_japanese")
