"""Attention over row caches, registered with transformers as the implementation "paceline".

transformers runs the model on one packed sequence [1, N]; only this function knows which token
belongs to which row. It writes the new keys and values into the rows' slots and lets every token see
its row's cached text, its ancestors in the draft, and itself. Grouped-query heads are folded into
the query axis, so keys and values are never expanded. Symbols: N packed tokens, R rows of a run,
W tokens a row, L cached positions, H query heads, Hkv key-value heads, G = H / Hkv, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from paceline.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.cache import RowCache

NAME: Final = "paceline"

# What an architecture may hand its attention function without changing what is computed here.
_HARMLESS: Final = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "cache_position", "is_causal", "position_embeddings", "past_key_values", "layer_past",
     "encoder_hidden_states", "encoder_attention_mask", "dropout"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """One row's tokens in a packed forward: `width` of them after `start` cached positions."""

    slot: int
    start: int
    width: int


@dataclass(slots=True)
class _Run:
    """Neighbouring slots with equal widths: one attention call."""

    first: int  # index of the first packed token
    slots: range
    starts: list[int]
    width: int
    ancestors: Tensor | None = None  # [W, W] bool, single rows only
    masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)
    index: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return max(self.starts) + self.width


class PackedBatch:
    """Which row every packed token belongs to. Built once a forward, read by every layer."""

    def __init__(
        self,
        spans: Sequence[Span],
        cache: RowCache,
        device: torch.device,
        ancestors: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.cache = cache
        self.device = device
        self.runs: list[_Run] = []
        first = 0
        for i, span in enumerate(spans):
            tree = ancestors[i] if ancestors is not None else None
            last = self.runs[-1] if self.runs else None
            if (
                last is not None
                and tree is None
                and last.ancestors is None
                and last.width == span.width
                and last.slots.stop == span.slot
                and span.width <= 64  # padding long prefills to one length would cost more
            ):
                last.slots = range(last.slots.start, span.slot + 1)
                last.starts.append(span.start)
            else:
                slots = range(span.slot, span.slot + 1)
                self.runs.append(_Run(first, slots, [span.start], span.width, tree))
            first += span.width
        self.num_tokens = first
        cache.reserve(max(run.length for run in self.runs))

    def positions(self) -> Tensor:
        """[1, N] absolute positions: start plus depth, which for a chain is start, start + 1, ..."""
        parts = []
        for run in self.runs:
            depth = (
                torch.arange(run.width)
                if run.ancestors is None
                else run.ancestors.sum(dim=-1).cpu() - 1
            )
            starts = torch.tensor(run.starts)
            parts.append((starts[:, None] + depth).flatten())
        return torch.cat(parts)[None].to(self.device)


def chain_ancestors(width: int, device: torch.device) -> Tensor:
    """[W, W] bool, True where the column is an ancestor of the row or the row itself."""
    return torch.ones(width, width, dtype=torch.bool, device=device).tril_()


def _visible(run: _Run, window: int | None, device: torch.device) -> Tensor:
    """[R, W, L] bool: which cached position each new token may see."""
    starts = torch.tensor(run.starts, device=device)[:, None, None]
    keys = torch.arange(run.length, device=device)
    depths = torch.arange(run.width, device=device)[:, None]
    if run.ancestors is None:
        visible = keys <= starts + depths
        position_of_query = starts + depths
        position_of_key = keys
    else:
        start = run.starts[0]
        tree = run.ancestors.to(device)
        past = torch.ones(run.width, start, dtype=torch.bool, device=device)
        visible = torch.cat([past, tree], dim=1)[None]
        tree_positions = start + tree.sum(dim=-1) - 1
        position_of_query = tree_positions[None, :, None]
        position_of_key = torch.cat([keys[:start], tree_positions])
    if window is not None:
        visible = visible & (position_of_key > position_of_query - window)
    return visible


def _mask(run: _Run, window: int | None, groups: int, like: Tensor) -> Tensor | None:
    """[R, 1, G*W, L] additive, or None where every token may see everything."""
    if window is not None and run.length <= window:
        window = None
    key = (window, groups)
    if key not in run.masks:
        if run.width == 1 and len(run.slots) == 1 and window is None:
            run.masks[key] = None
        else:
            visible = _visible(run, window, like.device)
            mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
            mask.masked_fill_(~visible, float("-inf"))
            tiled = mask[:, None].expand(-1, groups, -1, -1)
            run.masks[key] = tiled.reshape(len(run.slots), 1, groups * run.width, run.length)
    return run.masks[key]


def _store(run: _Run, storage: Tensor, new: Tensor) -> None:
    """Write [Hkv, R*W, D] new entries behind each row's cached ones."""
    if len(run.slots) == 1:
        start = run.starts[0]
        storage[run.slots.start, :, start : start + run.width] = new
        return
    if run.index is None:
        slots = torch.arange(run.slots.start, run.slots.stop, device=new.device)
        starts = torch.tensor(run.starts, device=new.device)
        places = starts[:, None] + torch.arange(run.width, device=new.device)
        run.index = (slots[:, None].expand_as(places).flatten(), places.flatten())
    slots, places = run.index
    storage[slots, :, places] = new.transpose(0, 1)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Softmax attention, by hand only where logits are capped (Gemma 2)."""
    if cap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scale / cap)) * cap
    if mask is not None:
        scores = scores + mask
    return scores.float().softmax(dim=-1).to(values.dtype) @ values


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: PackedBatch | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [1, H, N, D]; key, value: [1, Hkv, N, D].

    Returns [1, N, H, D]. An argument that is not known to leave the result alone is refused,
    because it would be silently ignored.
    """
    if packed is None:
        raise ModelError(f"{type(module).__name__} does not pass extra arguments to its attention")
    strange = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if strange or attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} hands its attention {strange or ['a mask']}, which the packed "
            "forward does not know"
        )
    num_heads, head_dim = query.shape[1], query.shape[3]
    num_kv_heads, value_dim = key.shape[1], value.shape[3]
    groups = num_heads // num_kv_heads
    scale = scaling if scaling is not None else head_dim**-0.5
    layer: Any = module.layer_idx
    keys, values = packed.cache.layer(layer, key)
    outputs = []
    for run in packed.runs:
        rows, width = len(run.slots), run.width
        stop = run.first + rows * width
        _store(run, keys, key[0, :, run.first : stop])
        _store(run, values, value[0, :, run.first : stop])
        k = keys[run.slots.start : run.slots.stop, :, : run.length]
        v = values[run.slots.start : run.slots.stop, :, : run.length]
        q = query[0, :, run.first : stop]
        q = q.reshape(num_kv_heads, groups, rows, width, head_dim).permute(2, 0, 1, 3, 4)
        q = q.reshape(rows, num_kv_heads, groups * width, head_dim)
        mask = _mask(run, sliding_window, groups, q)
        out = _attend(q, k, v, mask, scale, softcap)
        out = out.reshape(rows, num_heads, width, value_dim).transpose(1, 2)
        outputs.append(out.reshape(1, rows * width, num_heads, value_dim))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


AttentionInterface.register(NAME, packed_attention)
