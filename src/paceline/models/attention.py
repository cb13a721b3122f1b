"""Attention of packed tokens over row caches, for the lean forward and for transformers' own alike.

Writes the new keys and values into the rows' slots and lets every token see its row's cached text,
its ancestors in the draft, and itself. Grouped-query heads are folded into the query axis, so keys
and values are never expanded. Symbols: N packed tokens, R rows of a run, W tokens a row, L cached
positions, H query heads, Hkv key-value heads, G = H / Hkv, D head size.
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
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Cache the new keys and values, return [N, H, Dv] attention outputs.

    query: [N, H, D]. key, value: [N, Hkv, D] and [N, Hkv, Dv], rotated already. scale: of the
    scores. window: positions a token sees. cap: scores pass through cap * tanh(score / cap).
    """
    num_heads, head_dim = query.shape[1], query.shape[2]
    num_kv_heads, value_dim = key.shape[1], value.shape[2]
    groups = num_heads // num_kv_heads
    keys, values = packed.cache.layer(layer, key, value)
    outputs = []
    for run in packed.runs:
        rows, width, length = len(run.slots), run.width, run.length
        first, stop = run.first, run.first + rows * width
        _store(run, keys, key[first:stop])
        _store(run, values, value[first:stop])
        k = keys[run.slots.start : run.slots.stop, :, :length]
        v = values[run.slots.start : run.slots.stop, :, :length]
        q = query[first:stop].reshape(rows, width, num_kv_heads, groups, head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(rows, num_kv_heads, groups * width, head_dim)
        out = _attend(q, k, v, packed.mask(run, window, groups, q), scale, cap)
        out = out.reshape(rows, num_heads, width, value_dim).transpose(1, 2)
        outputs.append(out.reshape(rows * width, num_heads, value_dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _store(run: Run, storage: Tensor, new: Tensor) -> None:
    """Write [R*W, Hkv, D] new entries behind each row's cached ones."""
    if len(run.slots) == 1:
        start = run.starts[0]
        storage[run.slots.start, :, start : start + run.width] = new.transpose(0, 1)
        return
    if run.index is None:
        slots = torch.arange(run.slots.start, run.slots.stop, device=new.device)
        starts = torch.tensor(run.starts, device=new.device)
        places = starts[:, None] + torch.arange(run.width, device=new.device)
        run.index = (slots[:, None].expand_as(places).flatten(), places.flatten())
    slots, places = run.index
    storage[slots, :, places] = new


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
