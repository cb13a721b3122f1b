"""Attention of packed tokens over a row cache, for the lean forward and for transformers' own.

Writes the new keys and values into the rows' slots and lets every token see its row's cached text,
its ancestors in the draft, and itself. Grouped-query heads are folded into the query axis, so keys
and values are never expanded. Symbols: N packed tokens, R rows of a run, W tokens per row, L cached
positions, H query heads, Hkv key-value heads, G = H / Hkv, D head size.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol

import torch
import torch.nn.functional as F

from paceline.models.packing import build_biased_mask, build_mask, mask_sources, runs_of, store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from paceline.models.interfaces import Batch
    from paceline.models.packing import Bias, ChainMasks, Run, Span

# the batch of the running forward, for attention that transformers' code calls
CURRENT: Final[ContextVar[Batch]] = ContextVar("paceline_batch")

# Drafts up to this length slice their mask from a table instead of building it.
_MAX_TABLED_WIDTH: Final = 17


class Sources(Protocol):
    """The cache of the rows' sources; it has the same slots."""

    layers: list[Tensor | None]

    def length(self, slot: int) -> int: ...


class RowBatch:
    """The batch of a `RowCache`: runs of neighbouring slots, read by every layer."""

    def __init__(
        self,
        spans: Sequence[Span],
        storage_of: Callable[[int, Tensor], Tensor],
        device: torch.device,
        chain_masks: ChainMasks,
        parents: Sequence[Sequence[int] | None] | None = None,
        sources: Sources | None = None,
    ) -> None:
        """storage_of: a layer and its new entries -> [slots, 2*Hkv, positions, D] with room for them.

        sources: the cache of the rows' sources.
        """
        self.runs = runs_of(spans, parents)
        last = self.runs[-1]
        self.num_tokens = last.first + len(last.slots) * last.width
        self.num_positions = max(run.length for run in self.runs)
        self._storage_of = storage_of
        self._device = device
        self._chain_masks = chain_masks
        self._sources = sources

    def only_chain(self) -> range | None:
        run = self.runs[0]
        if len(self.runs) > 1 or len(run.slots) > 1 or run.ancestors is not None:
            return None
        return range(run.starts[0], run.starts[0] + run.width)

    def positions(self) -> Tensor:
        """Return [N] absolute positions: start plus depth, which for a chain is start, start + 1, ..."""
        parts = []
        for run in self.runs:
            depth = (
                torch.arange(run.width)
                if run.ancestors is None
                else run.ancestors.sum(dim=-1).cpu() - 1
            )
            starts = torch.tensor(run.starts)
            parts.append((starts[:, None] + depth).flatten())
        return torch.cat(parts).to(self._device)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key_value: Tensor,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        bias: Bias | None = None,
    ) -> Tensor:
        num_heads, head_dim = query.shape[1], query.shape[2]
        num_kv_heads = key_value.shape[1] // 2
        groups = num_heads // num_kv_heads
        storage = self._storage_of(layer, key_value)
        outputs = []
        for run in self.runs:
            rows, width = len(run.slots), run.width
            first, stop = run.first, run.first + rows * width
            whole = len(self.runs) == 1
            store(run, storage, key_value if whole else key_value[first:stop])
            cached = storage[run.slots.start : run.slots.stop].narrow(2, 0, run.length)
            keys, values = cached.split(num_kv_heads, dim=1)
            q = query if whole else query[first:stop]
            if width > 1:
                q = q.reshape(rows, width, num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
            q = q.reshape(rows, num_kv_heads, groups * width, head_dim)
            mask = self.mask(run, window, groups, q, bias)
            out = _attend(q, keys, values, mask, scale, cap)
            if width > 1:
                out = out.reshape(rows, num_heads, width, head_dim).transpose(1, 2)
            outputs.append(out.reshape(rows * width, num_heads, head_dim))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_to_source(self, layer: int, query: Tensor, scale: float) -> Tensor:
        assert self._sources is not None
        storage = self._sources.layers[layer]
        assert storage is not None
        num_heads = query.shape[1]
        outputs = []
        for run in self.runs:
            rows, width = len(run.slots), run.width
            lengths = [self._sources.length(slot) for slot in run.slots]
            cached = storage[run.slots.start : run.slots.stop].narrow(2, 0, max(lengths))
            keys, values = cached.split(num_heads, dim=1)
            q = query[run.first : run.first + rows * width].unflatten(0, (rows, width))
            mask = mask_sources(lengths, query) if min(lengths) < max(lengths) else None
            out = _attend(q.transpose(1, 2), keys, values, mask, scale, None)  # [R, H, W, D]
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def mask(
        self, run: Run, window: int | None, groups: int, like: Tensor, bias: Bias | None = None
    ) -> Tensor | None:
        """Return [R, 1, G*W, L] additive, or None where every token may see everything.

        window: number of positions that a token sees, its own included; None for all. bias: by head;
        with it the mask is [R, Hkv, G*W, L].
        """
        if window is not None and run.length <= window:
            window = None
        key = (window, groups) if bias is None else (window, groups, bias)
        if key not in run.masks:
            run.masks[key] = (
                self._unbiased_mask(run, window, groups, like)
                if bias is None
                else build_biased_mask(run, window, groups, like, bias)
            )
        return run.masks[key]

    def _unbiased_mask(
        self, run: Run, window: int | None, groups: int, like: Tensor
    ) -> Tensor | None:
        if len(run.slots) == 1 and window is None and run.ancestors is None:
            if run.width == 1:
                return None
            if run.width <= _MAX_TABLED_WIDTH:
                return self._chain_masks.mask(groups, run.width, run.starts[0], like)
        return build_mask(run, window, groups, like)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Return softmax attention, written out only where scores are capped (Gemma 2)."""
    if cap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scale / cap)) * cap
    if mask is not None:
        scores = scores + mask
    return scores.float().softmax(dim=-1).to(values.dtype) @ values
