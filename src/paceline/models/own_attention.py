"""Attention modules that bypass transformers' attention interface.

One short function per family: the module's queries, keys and values, packed attention, the module's
output layer. It replaces a method of the module during a forward. ALiBi (Press et al. 2022) is a bias
per key by its position, as the model's own code builds it: softmax ignores a constant added to all keys
of a query.
Symbols: N packed tokens, H query heads, Hkv key-value heads, D head size, L positions.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.models.attention import CURRENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from paceline.models.packing import KeyBias


@dataclass(frozen=True, slots=True)
class _LayerAttention:
    """The attention of one layer over the current batch, with the bias of its scores."""

    layer: int
    bias: KeyBias | None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Return outputs [N, H, D] of query [N, H, D] over key and value [N, Hkv, D]."""
        key_value = torch.cat((key, value), dim=1)
        batch = CURRENT.get()
        return batch.attend(self.layer, query, key_value, scale, window, bias=self.bias)


# --- modules whose scores, softmax and weighted sum are a method `_attn` of their own -------------


def _scores(
    scale: Callable[[Any], float],
    module: Any,
    attention: _LayerAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
) -> tuple[Tensor, None]:
    """Replace `_attn`. query, key, value: [1, H, N, D], as is the output."""
    is_local = getattr(module, "attention_type", None) == "local"  # GPT-Neo
    window = module.config.window_size if is_local else None
    # some models rotate queries and keys in float32 in every dtype
    q, k, v = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    out = attention.attend(q, k, v, scale(module), window)
    return out.transpose(0, 1)[None], None


def _gpt1(
    module: Any,
    attention: _LayerAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    output_attentions: bool = False,
) -> list[Tensor]:
    """Replace `_attn` of the first GPT, whose keys are [1, H, D, N]."""
    scale = value.shape[-1] ** -0.5 if module.scale else 1.0
    return [_scores(lambda _: scale, module, attention, query, key.transpose(2, 3), value)[0]]


# --- modules that do everything in `forward` ------------------------------------------------------


def _falcon(
    module: Any,
    attention: _LayerAttention,
    hidden_states: Tensor,  # [1, N, H * D]
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with query heads in groups of any size, each with one key and one value head."""
    grouped = module.new_decoder_architecture or module.multi_query
    num_kv_heads = module.num_kv_heads if grouped else module.num_heads
    query, key, value = _split(module.query_key_value(hidden_states), num_kv_heads, module.head_dim)
    if attention.bias is None:
        assert position_embeddings is not None
        turn = import_module(type(module).__module__).apply_rotary_pos_emb
        query, key = (t.transpose(0, 1)[None] for t in (query, key))
        query, key = turn(query, key, *position_embeddings)
        query, key = (t[0].transpose(0, 1) for t in (query, key))
    out = attention.attend(query, key, value, module.inv_norm_factor)
    return module.dense(out.flatten(1)[None]), None


def _bloom(
    module: Any, attention: _LayerAttention, hidden_states: Tensor, residual: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    heads, size = module.num_heads, module.head_dim
    query, key, value = _split(module.query_key_value(hidden_states), heads, size)
    out = attention.attend(query, key, value, module.inv_norm_factor)
    return module.dense(out.flatten(1)[None]) + residual, None


def _split(qkv: Tensor, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [1, N, ...], by group queries, key, value, into [N, H, D], [N, Hkv, D] and [N, Hkv, D]."""
    groups = qkv.view(qkv.shape[1], num_kv_heads, -1, head_dim)
    return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]


def _mpt(
    module: Any, attention: _LayerAttention, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = qkv[0].view(qkv.shape[1], 3, module.n_heads, module.head_dim).unbind(1)
    out = attention.attend(query, key, value, module.softmax_scale)
    return module.out_proj(out.flatten(1)[None]), None


def _xglm(
    module: Any, attention: _LayerAttention, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    layers = module.q_proj, module.k_proj, module.v_proj
    query, key, value = (
        layer(hidden_states)[0].unflatten(-1, (module.num_heads, -1)) for layer in layers
    )
    out = attention.attend(query, key, value, module.scaling)
    return module.out_proj(out.flatten(1)[None]), None


# --- biases by position ---------------------------------------------------------------------------


class _BloomBias:
    """Slopes times positions, from the model's code, which may round them."""

    def __init__(self, body: Any) -> None:
        self._build = import_module(type(body).__module__).build_alibi_tensor
        self._num_heads: int = body.num_heads
        config = body.config
        # Falcon scales scores and biases together, Bloom the scores alone
        scaled = config.model_type == "falcon"
        self._divisor = math.sqrt(config.hidden_size // self._num_heads) if scaled else 1.0
        self._table = torch.empty(self._num_heads, 0)

    def __call__(self, positions: Tensor) -> Tensor:
        highest = int(positions.max())
        if highest >= self._table.shape[1]:
            room = max(256, 2 * highest)
            ones = torch.ones(1, room, dtype=torch.int64, device=positions.device)
            table = self._build(ones, self._num_heads, dtype=torch.float32)
            self._table = table[:, 0] / self._divisor
        return self._table[:, positions]


class _MptBias:
    """Slopes times positions, counted backward from the last key."""

    def __init__(self, body: Any) -> None:
        # with two positions, the first is one before the last
        table = body.build_mpt_alibi_tensor(body.num_heads, 2)
        self._slopes: Tensor = -table[:, 0, :1]  # [H, 1]

    def __call__(self, positions: Tensor) -> Tensor:
        return self._slopes.to(positions.device) * (positions - positions.max())


# --- the families -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Family:
    """The replacement of one class of attention modules."""

    method: str  # the one that the function replaces
    function: Callable[..., Any]  # of the module, its `_LayerAttention`, and the method's arguments
    bias: Callable[[Any], KeyBias | None] = lambda body: None
    inputs: dict[str, Any] = field(default_factory=dict)  # additional inputs of its body


# by the folder of transformers.models and the name of the class
_FAMILIES: Final = {
    ("bloom", "BloomAttention"): _Family("forward", _bloom, _BloomBias),
    ("codegen", "CodeGenAttention"): _Family("_attn", partial(_scores, lambda m: 1 / m.scale_attn)),
    ("falcon", "FalconAttention"): _Family(
        "forward", _falcon, lambda body: _BloomBias(body) if body.use_alibi else None
    ),
    ("gpt_neo", "GPTNeoSelfAttention"): _Family("_attn", partial(_scores, lambda m: 1.0)),
    ("gpt_neox_japanese", "GPTNeoXJapaneseAttention"): _Family(
        "_attn", partial(_scores, lambda m: 1 / m.norm_factor)
    ),
    ("gptj", "GPTJAttention"): _Family("_attn", partial(_scores, lambda m: 1 / m.scale_attn)),
    # its body requires a mask, which is not used here
    ("mpt", "MptAttention"): _Family(
        "forward", _mpt, _MptBias, {"attention_mask": torch.ones(1, 1, 1, 1)}
    ),
    ("openai", "Attention"): _Family("_attn", _gpt1),
    ("xglm", "XGLMAttention"): _Family("forward", _xglm),
}


class OwnAttention:
    """The attention modules of a body that bypass transformers' interface; most bodies have none."""

    def __init__(self, body: nn.Module) -> None:
        self.inputs: dict[str, Any] = {}  # additional inputs of the body
        self._replacements: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        bias: KeyBias | None = None
        for module in body.modules():
            family = _family_of(module)
            if family is None:
                continue
            if not self._replacements:  # one bias for all layers, so that they share its masks
                bias, self.inputs = family.bias(body), family.inputs
            attention = _LayerAttention(len(self._replacements), bias)
            method = family.method
            if method == "forward" and "_old_forward" in module.__dict__:
                method = "_old_forward"  # accelerate's hooks wrap this one
            function = partial(family.function, module, attention)
            self._replacements.append((module, method, function))

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Let the modules attend over the rows of the current batch inside the block."""
        before = [module.__dict__.get(method) for module, method, _ in self._replacements]
        for module, method, function in self._replacements:
            module.__dict__[method] = function
        try:
            yield
        finally:
            for (module, method, _), own in zip(self._replacements, before, strict=True):
                if own is None:
                    del module.__dict__[method]
                else:  # another library had replaced it
                    module.__dict__[method] = own


def _family_of(module: nn.Module) -> _Family | None:
    """Return the family of an attention module, or None if it uses transformers' interface."""
    kind = type(module)
    path = kind.__module__.split(".")
    if path[:2] != ["transformers", "models"]:
        return None
    return _FAMILIES.get((path[2], kind.__name__))
