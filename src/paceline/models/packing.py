"""Rows packed into one forward: which token belongs to which row, where it stands, what it sees.

A forward takes N tokens of any rows, row after row. Neighbouring cache slots with equally many
tokens form one run, which is one attention call. Knows no model. Symbols: N packed tokens, R rows
of a run, W tokens a row, L cached positions, G query heads per key-value head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.models.cache import RowCache

# biases of keys, added to their scores: [L] positions -> [H, L]
KeyBias: TypeAlias = Callable[[Tensor], Tensor]

# Wider rows are prefill: padding them to one length would cost more than a call each saves.
_MAX_SHARED_WIDTH: Final = 64
# Drafts up to this length slice their mask from a table instead of building it.
_MAX_TABLED_WIDTH: Final = 17


@dataclass(frozen=True, slots=True)
class Span:
    """One row's tokens in a packed forward: `width` of them after `start` cached positions.

    prefill: whether they are a piece of a prompt, rather than a draft to be verified.
    """

    slot: int
    start: int
    width: int
    prefill: bool = False


@dataclass(slots=True)
class Run:
    """Neighbouring slots with equal widths: one attention call."""

    first: int  # index of the first packed token
    slots: range
    starts: list[int]
    width: int
    prefill: bool
    ancestors: Tensor | None = None  # [W, W] bool, single rows only
    masks: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict)
    index: Tensor | None = None  # [R*W*2*Hkv] places in the cache, for several rows

    @property
    def length(self) -> int:
        return max(self.starts) + self.width


class ChainMasks:
    """Additive masks of single chains, sliced from one table per width instead of built."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def mask(self, groups: int, width: int, start: int, like: Tensor) -> Tensor:
        """[1, 1, G*W, start + W]: token w sees the cached positions and tokens 0 to w."""
        key = (groups, width, like.dtype, like.device)
        table = self._tables.get(key)
        if table is None or table.shape[1] - width < start:
            room = 256
            while room < start:
                room *= 2
            table = torch.full((width, room + width), float("-inf"))
            table = table.triu_(room + 1).repeat(groups, 1).to(like)
            self._tables[key] = table
        room = table.shape[1] - width
        return table[None, None, :, room - start :]


class PackedBatch:
    """Which row every packed token belongs to. Built once a forward, read by every layer."""

    def __init__(
        self,
        spans: Sequence[Span],
        cache: RowCache,
        device: torch.device,
        ancestors: Sequence[Tensor | None] | None = None,
        chain_masks: ChainMasks | None = None,
        exact: bool = False,
    ) -> None:
        """exact: no row shares a call with another, see `exact.py`."""
        self.cache = cache
        self.device = device
        self.exact = exact
        self.runs: list[Run] = []
        self._chain_masks = chain_masks or ChainMasks()
        first = 0
        for i, span in enumerate(spans):
            tree = ancestors[i] if ancestors is not None else None
            last = self.runs[-1] if self.runs else None
            if (
                last is not None
                and not exact
                and tree is None
                and last.ancestors is None
                and last.width == span.width
                and last.slots.stop == span.slot
                and span.width <= _MAX_SHARED_WIDTH
            ):
                last.slots = range(last.slots.start, span.slot + 1)
                last.starts.append(span.start)
            else:
                slots = range(span.slot, span.slot + 1)
                self.runs.append(Run(first, slots, [span.start], span.width, span.prefill, tree))
            first += span.width
            cache.extend(span.slot, span.start + span.width)
        self.num_tokens = first
        self.num_positions = max(run.length for run in self.runs)

    def only_chain(self) -> range | None:
        """The positions, if all tokens are one row's chain: then slices do instead of indices."""
        run = self.runs[0]
        if len(self.runs) > 1 or len(run.slots) > 1 or run.ancestors is not None:
            return None
        return range(run.starts[0], run.starts[0] + run.width)

    def positions(self) -> Tensor:
        """[N] absolute positions: start plus depth, which for a chain is start, start + 1, ..."""
        parts = []
        for run in self.runs:
            depth = (
                torch.arange(run.width)
                if run.ancestors is None
                else run.ancestors.sum(dim=-1).cpu() - 1
            )
            starts = torch.tensor(run.starts)
            parts.append((starts[:, None] + depth).flatten())
        return torch.cat(parts).to(self.device)

    def mask(
        self, run: Run, window: int | None, groups: int, like: Tensor, bias: KeyBias | None = None
    ) -> Tensor | None:
        """[R, 1, G*W, L] additive, or None where every token may see everything.

        window: how many positions, its own included, a token sees; None is all of them. bias: of the
        keys, by head; with it the mask is [R, Hkv, G*W, L].
        """
        if window is not None and run.length <= window:
            window = None
        key = (window, groups) if bias is None else (window, groups, bias)
        if key not in run.masks:
            run.masks[key] = (
                self._build_mask(run, window, groups, like)
                if bias is None
                else _biased_mask(run, window, groups, like, bias)
            )
        return run.masks[key]

    def _build_mask(self, run: Run, window: int | None, groups: int, like: Tensor) -> Tensor | None:
        if len(run.slots) == 1 and window is None and run.ancestors is None:
            if run.width == 1:
                return None
            if run.width <= _MAX_TABLED_WIDTH:
                return self._chain_masks.mask(groups, run.width, run.starts[0], like)
        visible = _visible(run, window, like.device)
        mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
        mask.masked_fill_(~visible, float("-inf"))
        tiled = mask[:, None].expand(-1, groups, -1, -1)
        return tiled.reshape(len(run.slots), 1, groups * run.width, run.length)


def _visible(run: Run, window: int | None, device: torch.device) -> Tensor:
    """[R, W, L] bool: which cached position each new token may see."""
    starts = torch.tensor(run.starts, device=device)[:, None, None]
    keys = _key_positions(run, device)
    depths = torch.arange(run.width, device=device)[:, None]
    if run.ancestors is None:
        position_of_query = starts + depths
        visible = keys <= position_of_query
    else:
        start = run.starts[0]
        tree = run.ancestors.to(device)
        past = torch.ones(run.width, start, dtype=torch.bool, device=device)
        visible = torch.cat([past, tree], dim=1)[None]
        position_of_query = keys[None, start:, None]
    if window is not None:
        visible = visible & (keys > position_of_query - window)
    return visible


def _key_positions(run: Run, device: torch.device) -> Tensor:
    """Return the positions of the keys [L]; in a tree, a node's place is not its position."""
    positions = torch.arange(run.length, device=device)
    if run.ancestors is not None:
        start = run.starts[0]
        positions[start:] = start + run.ancestors.to(device).sum(dim=-1) - 1
    return positions


def _biased_mask(run: Run, window: int | None, groups: int, like: Tensor, bias: KeyBias) -> Tensor:
    """Return [R, Hkv, G*W, L] additive: the heads' biases of visible keys, -inf for the others."""
    by_key = bias(_key_positions(run, like.device)).to(like.dtype)  # [H, L]
    hidden = ~_visible(run, window, like.device)
    mask = by_key[:, None].masked_fill(hidden[:, None], float("-inf"))  # [R, H, W, L]
    return mask.unflatten(1, (-1, groups)).flatten(2, 3)


def store(run: Run, storage: Tensor, new: Tensor) -> None:
    """Write [R*W, 2*Hkv, D] new entries behind each row's cached ones."""
    if len(run.slots) == 1:
        place = storage[run.slots.start].narrow(1, run.starts[0], run.width)
        place.copy_(new.transpose(0, 1))
        return
    _, heads, positions, head_dim = storage.shape
    if run.index is None:
        starts = torch.tensor(run.starts, device=new.device)[:, None]
        at = starts + torch.arange(run.width, device=new.device)
        slots = torch.arange(run.slots.start, run.slots.stop, device=new.device)
        lines = slots[:, None] * heads + torch.arange(heads, device=new.device)
        run.index = (lines[:, None] * positions + at[:, :, None]).flatten()
    storage.view(-1, head_dim).index_copy_(0, run.index, new.reshape(-1, head_dim))
