"""What the compiled forward needs to know of a model: its sizes, factors and weights.

Symbols: D hidden size, F MLP size, V logits, H heads, Hkv key-value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


ACTIVATIONS: Final = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
    "relu": 3,
}
"""What `rows.activate` calls the activations that transformers' configurations name."""


@dataclass(slots=True)
class CrossFacts:
    """A decoder layer's attention to its source; keys and values come from the cache of sources."""

    norm: Tensor  # [D], before it
    query: Tensor  # [H d, D]
    out: Tensor  # [D, H d]


@dataclass(slots=True)
class LayerFacts:
    """One decoder layer's weights, as transformers holds them; None for what it has not.

    bias: a length -> what is added to scores [H, at least that] at distances 0, 1, ..., float32.
    """

    qkv: tuple[Tensor, ...]  # [H d, D], [Hkv d, D] twice
    qkv_bias: tuple[Tensor, ...] | None
    out: Tensor  # [D, H d]
    out_bias: Tensor | None
    gate_up: tuple[Tensor, ...]  # [F, D] twice, or once without a gate
    gate_up_bias: tuple[Tensor, ...] | None
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
    score_scale: float  # of both attentions
    bias: Callable[[int], Tensor] | None = None
    cross: CrossFacts | None = None


@dataclass(slots=True)
class Facts:
    """A model's sizes and weights outside its layers.

    angles: a length -> cosines and sines [length, tables, 2 * half_turned], float32; None if nothing
    is turned.
    """

    hidden_size: int
    mlp_size: int
    heads: int
    kv_heads: int
    head_dim: int
    half_turned: int
    num_positions: int
    angles: Callable[[int], Tensor] | None
    embedding: Tensor  # [V, D]
    final_norm: Tensor
    head: Tensor  # [V, D]
    head_bias: Tensor | None
    epsilon: float
    activation: int  # one of `ACTIVATIONS`
    is_gated: bool  # whether the MLP has a gate
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    score_cap: float = 0.0
    norms_whole: bool = False
