"""Attention of packed tokens over row caches, for the lean forward and for transformers' own alike.

Writes the new keys and values into the rows' slots and lets every token see its row's cached text,
its ancestors in the draft, and itself. Grouped-query heads are folded into the query axis, so keys
and values are never expanded. Symbols: N packed tokens, R rows of a run, W tokens a row, L cached
positions, H query heads, Hkv key-value heads, G = H / Hkv, D and Dv head sizes, F cached numbers of
a position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.packing import PackedBatch, Run


def attend(
    packed: PackedBatch,
    layer: int,
    query: Tensor,
    key_value: Tensor,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Cache the new keys and values, return [N, H, Dv] attention outputs.

    query: [N, H, D], rotated. key_value: [N, Hkv * (D + Dv)], each token's rotated keys of all heads
    and then its values. scale: of the scores. window: positions a token sees. cap: scores pass
    through cap * tanh(score / cap).
    """
    num_heads, head_dim = query.shape[1], query.shape[2]
    groups = num_heads // num_kv_heads
    value_dim = key_value.shape[1] // num_kv_heads - head_dim
    storage = packed.cache.layer(layer, key_value)
    outputs = []
    for run in packed.runs:
        rows, width, length = len(run.slots), run.width, run.length
        first, stop = run.first, run.first + rows * width
        whole = len(packed.runs) == 1
        _store(run, storage, key_value if whole else key_value[first:stop])
        # [R, Hkv, L, D] and [R, Hkv, L, Dv] views of the cached entries
        per_row, per_position = storage.stride(0), storage.stride(1)
        offset = run.slots.start * per_row
        keys = storage.as_strided(
            (rows, num_kv_heads, length, head_dim), (per_row, head_dim, per_position, 1), offset
        )
        values = storage.as_strided(
            (rows, num_kv_heads, length, value_dim),
            (per_row, value_dim, per_position, 1),
            offset + num_kv_heads * head_dim,
        )
        q = query if whole else query[first:stop]
        if width > 1:
            q = q.reshape(rows, width, num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(rows, num_kv_heads, groups * width, head_dim)
        out = _attend(q, keys, values, packed.mask(run, window, groups, q), scale, cap)
        if width > 1:
            out = out.reshape(rows, num_heads, width, value_dim).transpose(1, 2)
        outputs.append(out.reshape(rows * width, num_heads, value_dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _store(run: Run, storage: Tensor, new: Tensor) -> None:
    """Write [R*W, F] new entries behind each row's cached ones in [slots, positions, F]."""
    slots, positions, _ = storage.shape
    entries = storage.view(slots * positions, -1)
    if len(run.slots) == 1:
        start = run.slots.start * positions + run.starts[0]
        entries.narrow(0, start, run.width).copy_(new)
        return
    if run.index is None:
        starts = [
            slot * positions + start for slot, start in zip(run.slots, run.starts, strict=True)
        ]
        first = torch.tensor(starts, device=new.device)[:, None]
        run.index = (first + torch.arange(run.width, device=new.device)).flatten()
    entries.index_copy_(0, run.index, new)


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
