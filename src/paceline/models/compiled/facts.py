"""What the compiled forward needs to know of a model: its sizes, factors and weights.

Symbols: D hidden size, F MLP size, V logits, H heads, Hkv key-value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(slots=True)
class LayerFacts:
    """One decoder layer's weights, as transformers holds them; None for what it has not."""

    qkv: tuple[Tensor, ...]  # [H d, D], [Hkv d, D] twice
    qkv_bias: tuple[Tensor, ...] | None
    out: Tensor  # [D, H d]
    out_bias: Tensor | None
    gate: Tensor  # [F, D]
    up: Tensor
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
