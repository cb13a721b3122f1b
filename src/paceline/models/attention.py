"""Attention of packed tokens over row caches, for the lean forward and for transformers' own alike.

Writes the new keys and values into the rows' slots and lets every token see its row's cached text,
its ancestors in the draft, and itself. Grouped-query heads are folded into the query axis, so keys
and values are never expanded. Symbols: N packed tokens, R rows of a run, W tokens a row, L cached
positions, H query heads, Hkv key-value heads, G = H / Hkv, D head size.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from paceline.models.cuda.batch import PagedBatch
from paceline.models.exact import attend_exactly
from paceline.models.packing import store

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.packing import KeyBias, PackedBatch

# the batch of the running forward, for attention that transformers' code calls
CURRENT: Final[ContextVar[PackedBatch | PagedBatch]] = ContextVar("paceline_batch")


def attend(
    packed: PackedBatch | PagedBatch,
    layer: int,
    query: Tensor,
    key_value: Tensor,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    bias: KeyBias | None = None,
) -> Tensor:
    """Cache the new keys and values, return [N, H, D] attention outputs.

    query: [N, H, D], rotated. key_value: [N, 2 * Hkv, D], each token's rotated keys of all heads and
    then its values. scale: of the scores. window: positions a token sees. cap: scores pass through
    cap * tanh(score / cap). bias: function of the keys' positions, added to the scaled scores (ALiBi).
    """
    if isinstance(packed, PagedBatch):
        return packed.attend(layer, query, key_value, scale, window, cap, bias)
    num_heads, head_dim = query.shape[1], query.shape[2]
    num_kv_heads = key_value.shape[1] // 2
    groups = num_heads // num_kv_heads
    storage = packed.cache.layer(layer, key_value)
    if packed.exact:
        return attend_exactly(packed, storage, query, key_value, scale, window)
    outputs = []
    for run in packed.runs:
        rows, width = len(run.slots), run.width
        first, stop = run.first, run.first + rows * width
        whole = len(packed.runs) == 1
        store(run, storage, key_value if whole else key_value[first:stop])
        cached = storage[run.slots.start : run.slots.stop].narrow(2, 0, run.length)
        keys, values = cached.split(num_kv_heads, dim=1)
        q = query if whole else query[first:stop]
        if width > 1:
            q = q.reshape(rows, width, num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(rows, num_kv_heads, groups * width, head_dim)
        mask = packed.mask(run, window, groups, q, bias)
        out = _attend(q, keys, values, mask, scale, cap)
        if width > 1:
            out = out.reshape(rows, num_heads, width, head_dim).transpose(1, 2)
        outputs.append(out.reshape(rows * width, num_heads, head_dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Softmax attention, by hand only where scores are capped (Gemma 2)."""
    if cap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scale / cap)) * cap
    if mask is not None:
        scores = scores + mask
    return scores.float().softmax(dim=-1).to(values.dtype) @ values
