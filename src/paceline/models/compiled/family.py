"""Architectures that the compiled forward runs, read from transformers' modules.

Most are decoders of rotary attention and a gated MLP; `_READERS` says how each differs from Llama.
T5's decoders are read in `t5.py`. `facts_of` reads a model, `why_not_compiled` says why one does not
fit, and the self-check at load compares the result with transformers' own forward. Symbols: O outputs,
I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn

from paceline.models.compiled.angles import RotaryAngles
from paceline.models.compiled.facts import ACTIVATIONS, Facts, LayerFacts
from paceline.models.compiled.t5 import T5Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

_DTYPES: Final = (torch.bfloat16, torch.float32)
# angles that depend on the length of the text cannot be tabled by position; those of longrope do not
# within the context that `context_length_of` gives
_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn", "proportional", "longrope"})


class _Linear(NamedTuple):
    """A linear map, which may be a part of a module's."""

    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]


class _Norms(NamedTuple):
    """The names of a layer's norms, None for one that it has not."""

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None


_PRE_NORMS: Final = _Norms("input_layernorm", None, "post_attention_layernorm")
_POST_NORMS: Final = _Norms(
    after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"
)
_GEMMA_NORMS: Final = _Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _linear(module: Any) -> _Linear:
    return _Linear(module.weight.data, None if module.bias is None else module.bias.data)


def _split(module: Any, sizes: Sequence[int]) -> list[_Linear]:
    """Return the parts of a linear module of `sizes` outputs each."""
    weights = module.weight.data.split(sizes)
    biases = [None] * len(sizes) if module.bias is None else module.bias.data.split(sizes)
    return [_Linear(*pair) for pair in zip(weights, biases, strict=True)]


def _separate(layer: Any) -> list[_Linear]:
    """Return the maps of queries, keys, values, gate and up of a layer with a module for each."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    return [_linear(module) for module in modules]


def _fused(layer: Any) -> list[_Linear]:
    """Return the same of a layer with one module for attention's and one for the MLP's."""
    attention, mlp = layer.self_attn, layer.mlp
    keys = attention.num_key_value_heads * attention.head_dim
    qkv = _split(attention.qkv_proj, (attention.o_proj.in_features, keys, keys))
    return qkv + _split(mlp.gate_up_proj, [mlp.down_proj.in_features] * 2)


def _no_factors(body: Any, config: Any) -> dict[str, float]:
    """Return the factors and caps of a model that has none."""
    return {}


def _granite_factors(body: Any, config: Any) -> dict[str, float]:
    return {
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }


def _hyperclovax_factors(body: Any, config: Any) -> dict[str, float]:
    return _granite_factors(body, config) | {"logit_scale": config.logits_scaling}


def _scaled_embedding(body: Any, config: Any) -> dict[str, float]:
    """Return the scale of a Gemma's embedding, rounded to the model's dtype as transformers does."""
    embedding = body.embed_tokens
    return {"embedding_scale": float(embedding.embed_scale.to(embedding.weight.dtype))}


def _gemma3_factors(body: Any, config: Any) -> dict[str, float]:
    cap = config.final_logit_softcapping or 0.0
    return _scaled_embedding(body, config) | {"logit_cap": cap}


def _gemma2_factors(body: Any, config: Any) -> dict[str, float]:
    cap = config.attn_logit_softcapping or 0.0
    return _gemma3_factors(body, config) | {"score_cap": cap}


def _always(attention: Any) -> bool:
    return True


def _smollm3_turns(attention: Any) -> bool:
    return bool(attention.use_rope)


def _exaone4_turns(attention: Any) -> bool:
    return bool(attention.sliding_window is None or attention.is_sliding)


def _plain_body(model: Any) -> Any:
    return model.model


def _text_body(model: Any) -> Any:
    return model.model.language_model


@dataclass(frozen=True, slots=True)
class _Reader:
    """How to read the modules of an architecture; the defaults are Llama's.

    norm_shift: what is added to the weights of norms. norms_whole: whether the norms of queries and
    keys cover all heads at once. activation: the configuration's field. factors: (body, text
    configuration) -> fields of `Facts`. turns: whether an attention module rotates.
    """

    norms: _Norms = _PRE_NORMS
    norm_shift: float = 0.0
    norms_whole: bool = False
    activation: str = "hidden_act"
    projections: Callable[[Any], list[_Linear]] = _separate
    factors: Callable[[Any, Any], dict[str, float]] = _no_factors
    turns: Callable[[Any], bool] = _always
    body: Callable[[Any], Any] = _plain_body

    def layers(self, model: Any) -> list[tuple[Any, Any]]:
        """Return the modules of each layer that have linear ones, attention to the text first."""
        return [(layer.self_attn, layer.mlp) for layer in self.body(model).layers]

    def facts(
        self, model: Any, windows: Mapping[int, int | None], num_positions: int
    ) -> tuple[Facts, list[LayerFacts]]:
        """Return what `facts_of` does."""
        return _rotary_facts(self, model, windows, num_positions)

    def norm(self, owner: Any, name: str | None) -> Tensor | None:
        """Return the factors of a norm in float32, None if its owner has none of that name."""
        weight = None if name is None else getattr(getattr(owner, name, None), "weight", None)
        return None if weight is None else weight.data.float() + self.norm_shift


def _gemma(norms: _Norms, factors: Callable[[Any, Any], dict[str, float]], **more: Any) -> _Reader:
    """Return the reader of a later Gemma."""
    return _Reader(norms, 1.0, activation="hidden_activation", factors=factors, **more)


_LLAMA: Final = _Reader()
_READERS: Final[dict[str, _Reader | T5Reader]] = {
    "LlamaForCausalLM": _LLAMA,
    "CwmForCausalLM": _LLAMA,
    "MinistralForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "SeedOssForCausalLM": _LLAMA,
    "Exaone4ForCausalLM": _Reader(_POST_NORMS, turns=_exaone4_turns),
    "GemmaForCausalLM": _Reader(norm_shift=1.0, factors=_scaled_embedding),
    "Gemma2ForCausalLM": _gemma(_GEMMA_NORMS, _gemma2_factors),
    "Gemma3ForCausalLM": _gemma(_GEMMA_NORMS, _gemma3_factors),
    "Gemma3ForConditionalGeneration": _gemma(_GEMMA_NORMS, _scaled_embedding, body=_text_body),
    "VaultGemmaForCausalLM": _gemma(
        _Norms("input_layernorm", None, "pre_feedforward_layernorm"), _gemma2_factors
    ),
    "GraniteForCausalLM": _Reader(factors=_granite_factors),
    "HyperCLOVAXForCausalLM": _Reader(
        _Norms("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
        factors=_hyperclovax_factors,
    ),
    "Olmo2ForCausalLM": _Reader(_POST_NORMS, norms_whole=True),
    "Olmo3ForCausalLM": _Reader(_POST_NORMS, norms_whole=True),
    "Phi3ForCausalLM": _Reader(projections=_fused),
    "SmolLM3ForCausalLM": _Reader(turns=_smollm3_turns),
    "T5ForConditionalGeneration": T5Reader("scale_decoder_outputs"),
    "MT5ForConditionalGeneration": T5Reader(),
    "UMT5ForConditionalGeneration": T5Reader("tie_word_embeddings"),
}


def why_not_compiled(model: PreTrainedModel) -> str | None:
    """Return the reason why the compiled forward does not fit a model, or None if it fits."""
    kind = type(model)
    reader = _READERS.get(kind.__name__)
    if reader is None or not kind.__module__.startswith("transformers.models."):
        return f"compiled code does not know {kind.__name__}"
    parameters = list(model.parameters())
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        return "its weights have several dtypes or devices"
    if parameters[0].device.type != "cpu":
        return f"its weights are on {parameters[0].device.type}, and compiled code runs on the CPU"
    if parameters[0].dtype not in _DTYPES:
        return f"its weights are {str(parameters[0].dtype).removeprefix('torch.')}"
    parts: Any = reader.body(model).embed_tokens, model.get_output_embeddings()
    embedding, head = (part.weight for part in parts)
    if embedding.shape != head.shape:
        return f"its embedding {tuple(embedding.shape)} and its head {tuple(head.shape)} differ"
    return _why_not_config(reader, model.config.get_text_config()) or _why_not_modules(
        reader.body(model), reader.layers(model), model.get_output_embeddings()
    )


def _why_not_config(reader: _Reader | T5Reader, config: Any) -> str | None:
    """Return the field of a configuration that the compiled forward cannot follow."""
    rope = getattr(config, "rope_parameters", None) or {}
    # by layer type, or one for all
    for part in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        if part.get("rope_type", "default") not in _ROPES:
            return f"its rope type '{part['rope_type']}' depends on the length of the text"
    activation = getattr(config, reader.activation)
    return None if activation in ACTIVATIONS else f"its activation is {activation}"


def _why_not_modules(body: Any, layers: Sequence[Sequence[Any]], head: Any) -> str | None:
    """Return what stands in a model instead of plain modules, or None."""
    for module in (head, *body.modules()):
        if module._forward_hooks or module._forward_pre_hooks:
            return "its modules have hooks"
    for linear in (head, *(linear for layer in layers for linear in _linears(layer))):
        # quantised weights come as other layers, or as other tensors in the usual ones
        kinds = type(linear), type(linear.weight.data)
        if kinds != (nn.Linear, torch.Tensor):
            odd = next(k for k in kinds if k not in (nn.Linear, torch.Tensor))
            return f"{odd.__name__} stands where a plain linear layer should"
    if not all(attention.is_causal for attention, *_ in layers):
        return "its attention sees later tokens"
    return None


def _linears(parts: Sequence[Any]) -> list[Any]:
    """Return the linear modules of a decoder layer's parts."""
    return [
        child
        for part in parts
        for child in part.children()
        if hasattr(child, "weight") and child.weight.ndim == 2 and type(child) is not nn.Embedding
    ]


def facts_of(
    model: PreTrainedModel, windows: Mapping[int, int | None], num_positions: int
) -> tuple[Facts, list[LayerFacts]]:
    """Return a model's facts and those of its layers. windows: positions that each layer sees."""
    return _READERS[type(model).__name__].facts(model, windows, num_positions)


def _rotary_facts(
    reader: _Reader,
    model: PreTrainedModel,
    windows: Mapping[int, int | None],
    num_positions: int,
) -> tuple[Facts, list[LayerFacts]]:
    body, head = reader.body(model), _linear(model.get_output_embeddings())
    config: Any = model.config.get_text_config()
    angles = RotaryAngles(body.rotary_emb)
    final_norm = reader.norm(body, "norm")
    assert final_norm is not None
    facts = Facts(
        hidden_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=body.layers[0].self_attn.head_dim,
        half_turned=angles.half_turned,
        num_positions=num_positions,
        angles=angles,
        embedding=body.embed_tokens.weight.data.contiguous(),
        final_norm=final_norm,
        head=head.weight,
        head_bias=head.bias,
        epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[getattr(config, reader.activation)],
        norms_whole=reader.norms_whole,
        is_gated=True,
        **reader.factors(body, config),
    )
    tables = [angles.kinds.index(kind) for kind in config.layer_types] if angles.kinds else None
    layers = []
    for i, layer in enumerate(body.layers):
        turns = (tables[i] if tables else 0) if reader.turns(layer.self_attn) else -1
        layers.append(_read_layer(reader, layer, windows[i], turns))
    return facts, layers


def _read_layer(reader: _Reader, layer: Any, window: int | None, turns: int) -> LayerFacts:
    attention, names = layer.self_attn, reader.norms
    *qkv, gate, up = reader.projections(layer)
    out, down = _linear(attention.o_proj), _linear(layer.mlp.down_proj)
    return LayerFacts(
        qkv=tuple(part.weight for part in qkv),
        qkv_bias=_biases(qkv),
        out=out.weight,
        out_bias=out.bias,
        gate_up=(gate.weight, up.weight),
        gate_up_bias=_biases((gate, up)),
        down=down.weight,
        down_bias=down.bias,
        norm_1=reader.norm(layer, names.before_attention),
        post_norm_1=reader.norm(layer, names.after_attention),
        norm_2=reader.norm(layer, names.before_mlp),
        post_norm_2=reader.norm(layer, names.after_mlp),
        query_norm=reader.norm(attention, "q_norm"),
        key_norm=reader.norm(attention, "k_norm"),
        window=window,
        turns=turns,
        score_scale=attention.scaling,
    )


def _biases(linears: Sequence[_Linear]) -> tuple[Tensor, ...] | None:
    """Return the biases of maps that become one product, zeros for those without; None if none has."""
    if all(bias is None for _, bias in linears):
        return None
    return tuple(w.new_zeros(len(w)) if bias is None else bias for w, bias in linears)
