"""The lean forward of the Llama family (Llama, Mistral, Qwen2, Qwen3): about fifteen calls per layer.

The fast twin of transformers' forward on CUDA, and the readable reference of the compiled one on the
CPU, with the same weights: one product for queries, keys and values, one for gate and up, angles from a
table. `why_not_lean` decides by a model's modules, and the self-check at load compares the forward with
transformers' own.
Symbols: N packed tokens, D hidden size, H query heads, Hkv key-value heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import nn

from paceline.models.products import Product
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.models.interfaces import Batch

_FAMILY: Final = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
_NOTHING: Final = LayerSubset()
# angles that depend on the length of the text cannot be tabled by position
_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn"})


def why_not_lean(model: PreTrainedModel) -> str | None:
    """Return the reason why the lean forward does not fit a model, or None if it fits."""
    kind = type(model)
    if kind.__name__ not in _FAMILY or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not of the Llama family"
    anything: Any = model
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _ROPES:
        return f"its rope type '{rope['rope_type']}' depends on the length of the text"
    if model.config.hidden_act not in ("silu", "swish"):
        return f"its activation is {model.config.hidden_act}"
    parameters = list(model.parameters())
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        return "its weights have several dtypes or devices"
    if not parameters[0].dtype.is_floating_point or parameters[0].device.type == "meta":
        return "its weights are not plain numbers"
    for module in (anything.lm_head, *anything.model.modules()):
        if module._forward_hooks or module._forward_pre_hooks:
            return "its modules have hooks"
    for layer in anything.model.layers:
        a, m = layer.self_attn, layer.mlp
        linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        for linear in (*linears, anything.lm_head):
            # quantised weights come as other layers, or as other tensors in the usual ones
            kinds = type(linear), type(linear.weight.data)
            if kinds != (nn.Linear, torch.Tensor):
                odd = next(k for k in kinds if k not in (nn.Linear, torch.Tensor))
                return f"{odd.__name__} stands where a plain linear layer should"
    return None


class _Norm:
    """Root-mean-square norm over the last dimension, scaled by a weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., D], of the same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],), self._weight, self._eps)


class _Layer:
    """One decoder layer's products, norms and attention shape."""

    def __init__(self, layer: Any, config: Any, window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        eps = config.rms_norm_eps
        self.norm_1 = _Norm(layer.input_layernorm.weight.data, eps)
        self.norm_2 = _Norm(layer.post_attention_layernorm.weight.data, eps)
        self.qkv = Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = Product([attention.o_proj])
        self.gate_up = Product([mlp.gate_proj, mlp.up_proj])
        self.down = Product([mlp.down_proj])
        self.qk_norms: tuple[_Norm, _Norm] | None = None
        if hasattr(attention, "q_norm"):  # Qwen3
            norms = attention.q_norm, attention.k_norm
            self.qk_norms = _Norm(norms[0].weight.data, eps), _Norm(norms[1].weight.data, eps)
        self.scale: float = attention.scaling
        self.window = window


class LeanForward:
    """Body and head of a Llama-like model; call `why_not_lean` first."""

    kind: ClassVar[str] = "lean"

    def __init__(self, model: PreTrainedModel, windows: Mapping[int, int | None]) -> None:
        """windows: positions that each layer sees, see `visibility.py`."""
        anything: Any = model
        config = model.config
        layers = enumerate(anything.model.layers)
        self._layers = [_Layer(layer, config, windows[i]) for i, layer in layers]
        self._head = Product([anything.lm_head])
        self._embedding: Tensor = anything.model.embed_tokens.weight.data
        self._norm = _Norm(anything.model.norm.weight.data, config.rms_norm_eps)
        self._num_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads
        self._head_dim: int = anything.model.layers[0].self_attn.head_dim
        self._rotary = _RotaryTable(anything.model.rotary_emb, self._embedding)

    def reserve_positions(self, num_positions: int) -> None:
        """Compute the angles of positions below `num_positions` now, so that their table stays."""
        self._rotary.reserve(num_positions)

    def hidden(self, tokens: Tensor, batch: Batch, skip: LayerSubset | None = None) -> Tensor:
        without = skip or _NOTHING
        cos, sin = self._rotary.at(batch)
        stream = F.embedding(tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            if index not in without.attention:
                mixed = self._attend(layer.norm_1(stream), index, cos, sin, batch)
                stream = layer.out(mixed).add_(stream)
            if index not in without.mlp:
                gate, up = layer.gate_up(layer.norm_2(stream)).chunk(2, dim=-1)
                stream = layer.down(F.silu(gate).mul_(up)).add_(stream)
        return self._norm(stream)

    def _attend(self, x: Tensor, index: int, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """Return [N, H * head size], before the output product. x: [N, D]."""
        layer, heads, kv_heads = self._layers[index], self._num_heads, self._num_kv_heads
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, self._head_dim)
        query_key = qkv[:, : heads + kv_heads]
        if layer.qk_norms is not None:
            norm_query, norm_key = layer.qk_norms
            query_key[:, :heads] = norm_query(query_key[:, :heads])
            query_key[:, heads:] = norm_key(query_key[:, heads:])
        # turn each pair (x, y) of halves by its position's angle, within the product's own buffer
        turned = query_key * cos
        turned_x, turned_y = turned.chunk(2, dim=-1)
        x, y = query_key.chunk(2, dim=-1)
        turned_x.addcmul_(y, sin, value=-1)
        turned_y.addcmul_(x, sin)
        query_key.copy_(turned)
        out = batch.attend(index, turned[:, :heads], qkv[:, heads:], layer.scale, layer.window)
        return out.flatten(1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)


class _RotaryTable:
    """Cosines and sines of the rotary embedding by position, which grows on demand."""

    def __init__(self, rotary: Any, like: Tensor) -> None:
        self._rotary = rotary
        self._like = like
        self._cos = self._sin = like.new_empty((0, 1, 0))

    def reserve(self, num_positions: int) -> None:
        """Make the table cover positions below `num_positions`."""
        if num_positions <= self._cos.shape[0]:
            return
        length = max(num_positions, 2 * self._cos.shape[0], 256)
        length = max(num_positions, min(length, int(self._rotary.max_seq_len_cached)))
        positions = torch.arange(length, device=self._like.device)[None]
        cos, sin = self._rotary(self._like, positions)
        self._cos = cos[0, :, None]
        self._sin = sin[0, :, None].chunk(2, dim=-1)[0].contiguous()  # its halves are the same

    def at(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cosines [N, 1, D] and sines [N, 1, D/2] of the packed tokens, D the head size."""
        if batch.num_positions > self._cos.shape[0]:
            self.reserve(batch.num_positions)
        chain = batch.only_chain()
        if chain is not None:
            return self._cos[chain.start : chain.stop], self._sin[chain.start : chain.stop]
        positions = batch.positions()
        return self._cos[positions], self._sin[positions]
