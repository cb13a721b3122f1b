"""What the compiled forward needs to know of a model, read from transformers' modules.

The Llama family: pre-norm or post-norm layers of rotary attention and a gated MLP. `facts_of` reads a
model, `why_not_compiled` says why one does not fit, and the self-check at load compares the result with
transformers' own forward. Symbols: D hidden size, F MLP size, V logits, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_DTYPES: Final = (torch.bfloat16, torch.float32)
_ACTIVATIONS: Final = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2}
# angles that depend on the length of the text cannot be tabled by position
_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
_FAMILY: Final = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)


@dataclass(slots=True)
class LayerFacts:
    """One decoder layer's weights, as transformers holds them; None for what it has not."""

    qkv: tuple[Tensor, Tensor, Tensor]  # [H d, D], [Hkv d, D] twice
    qkv_bias: tuple[Tensor, Tensor, Tensor] | None
    out: Tensor  # [D, H d]
    out_bias: Tensor | None
    gate: Tensor  # [F, D]
    up: Tensor
    gate_up_bias: tuple[Tensor, Tensor] | None
    down: Tensor  # [D, F]
    down_bias: Tensor | None
    norm_1: Tensor | None  # [D], before attention
    post_norm_1: Tensor | None  # after it, before the residual
    norm_2: Tensor | None
    post_norm_2: Tensor | None
    query_norm: Tensor | None  # [d], or [H d]
    key_norm: Tensor | None
    window: int | None
    turns: int  # which of the model's angles, -1 for none
    score_scale: float


@dataclass(slots=True)
class Facts:
    """A model's sizes and weights outside its layers.

    angles: a length -> cosines and sines [tables, length, 2 * half_turned], float32.
    """

    hidden_size: int
    mlp_size: int
    heads: int
    kv_heads: int
    head_dim: int
    half_turned: int
    num_positions: int
    angles: Callable[[int], Tensor]
    embedding: Tensor  # [V, D]
    final_norm: Tensor
    head: Tensor  # [V, D]
    head_bias: Tensor | None
    epsilon: float
    activation: int  # as in `rows.activate`
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    score_cap: float = 0.0
    norms_whole: bool = False


def why_not_compiled(model: PreTrainedModel) -> str | None:
    """Return the reason why the compiled forward does not fit a model, or None if it fits."""
    kind = type(model)
    if kind.__name__ not in _FAMILY or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not of the Llama family"
    anything: Any = model
    parameters = list(model.parameters())
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        return "its weights have several dtypes or devices"
    if parameters[0].device.type != "cpu":
        return f"its weights are on {parameters[0].device.type}, and compiled code runs on the CPU"
    if parameters[0].dtype not in _DTYPES:
        return f"its weights are {str(parameters[0].dtype).removeprefix('torch.')}"
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _ROPES:
        return f"its rope type '{rope['rope_type']}' depends on the length of the text"
    if model.config.hidden_act not in _ACTIVATIONS:
        return f"its activation is {model.config.hidden_act}"
    for module in (anything.lm_head, *anything.model.layers.modules()):
        if module._forward_hooks or module._forward_pre_hooks:
            return "its modules have hooks"
    for layer in anything.model.layers:
        for linear in _linears(layer):
            # quantised weights come as other layers, or as other tensors in the usual ones
            kinds = type(linear), type(linear.weight.data)
            if kinds != (nn.Linear, torch.Tensor):
                odd = next(k for k in kinds if k not in (nn.Linear, torch.Tensor))
                return f"{odd.__name__} stands where a plain linear layer should"
    return None


def _linears(layer: Any) -> list[Any]:
    """Return a decoder layer's linear modules."""
    return [
        child
        for part in (layer.self_attn, layer.mlp)
        for child in part.children()
        if hasattr(child, "weight") and child.weight.ndim == 2  # noqa: PLR2004 - a matrix
    ]


def facts_of(
    model: PreTrainedModel, windows: Mapping[int, int | None], num_positions: int
) -> tuple[Facts, list[LayerFacts]]:
    """Return a model's facts and those of its layers. windows: positions that each layer sees."""
    anything: Any = model
    body, config = anything.model, model.config.get_text_config()
    attention = body.layers[0].self_attn
    angles = _Angles(body.rotary_emb)
    facts = Facts(
        hidden_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        half_turned=angles.half_turned,
        num_positions=num_positions,
        angles=angles,
        embedding=body.embed_tokens.weight.data,
        final_norm=body.norm.weight.data,
        head=anything.lm_head.weight.data,
        head_bias=_bias(anything.lm_head),
        epsilon=config.rms_norm_eps,
        activation=_ACTIVATIONS[config.hidden_act],
    )
    layers = [_read_layer(layer, windows[i]) for i, layer in enumerate(body.layers)]
    return facts, layers


def _bias(linear: Any) -> Tensor | None:
    return None if linear.bias is None else linear.bias.data


def _read_layer(layer: Any, window: int | None) -> LayerFacts:
    attention, mlp = layer.self_attn, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerFacts(
        qkv=tuple(p.weight.data for p in projections),  # type: ignore[arg-type]
        qkv_bias=_biases(projections),  # type: ignore[arg-type]
        out=attention.o_proj.weight.data,
        out_bias=_bias(attention.o_proj),
        gate=mlp.gate_proj.weight.data,
        up=mlp.up_proj.weight.data,
        gate_up_bias=_biases((mlp.gate_proj, mlp.up_proj)),  # type: ignore[arg-type]
        down=mlp.down_proj.weight.data,
        down_bias=_bias(mlp.down_proj),
        norm_1=layer.input_layernorm.weight.data,
        post_norm_1=None,
        norm_2=layer.post_attention_layernorm.weight.data,
        post_norm_2=None,
        query_norm=None if norms[0] is None else norms[0].weight.data,
        key_norm=None if norms[1] is None else norms[1].weight.data,
        window=window,
        turns=0,
        score_scale=attention.scaling,
    )


def _biases(linears: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
    """Return the biases of layers that become one product, zeros for those without; None if none has."""
    found = [_bias(linear) for linear in linears]
    if all(bias is None for bias in found):
        return None
    return tuple(
        linear.weight.new_zeros(linear.weight.shape[0]) if bias is None else bias
        for linear, bias in zip(linears, found, strict=True)
    )


class _Angles:
    """Cosines and sines by position, in float32 whatever the model's dtype."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self.half_turned = self(1).shape[-1] // 2

    def __call__(self, length: int) -> Tensor:
        positions = torch.arange(length)[None]
        cos, sin = self._rotary(torch.zeros(1, dtype=torch.float32), positions)
        half = cos.shape[-1] // 2  # the second half is the same
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)[None]
