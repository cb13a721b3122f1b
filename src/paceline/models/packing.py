"""Rows packed into one forward: the tokens of each row, their slots, and the positions they see.

A forward takes N tokens of any rows, row after row. Neighbouring cache slots with equally many tokens
form one run, which is one attention call. Knows no model and no cache.
Symbols: N packed tokens, R rows of a run, W tokens per row, L cached positions, H query heads, Hkv
key-value heads, G = H / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

# biases of keys, added to their scores: [L] positions -> [H, L]
KeyBias: TypeAlias = Callable[[Tensor], Tensor]


class DistanceBias(Protocol):
    """Biases of scores by the distance from the key to the query."""

    def by_distance(self, num_distances: int) -> Tensor:
        """Return [H, at least num_distances] biases of distances 0, 1, ..."""


Bias: TypeAlias = KeyBias | DistanceBias

# positions; prompts share their prefill in blocks of this size
PREFILL_BLOCK: Final = 64

# Wider rows are prefill: padding them to one length would cost more than a call each saves.
_MAX_SHARED_WIDTH: Final = 64


class Span(NamedTuple):
    """One row's tokens in a packed forward: `width` of them after `start` cached positions.

    prefill: whether they are a piece of a prompt, rather than a draft to be verified.
    """

    slot: int
    start: int
    width: int
    prefill: bool = False


class Draw(NamedTuple):
    """How the next token of a row is drawn in a chain: with the noise of `paceline.noise.TARGET`.

    position: in the row's text, of the first token drawn. temperature: above 0.
    """

    seed: int
    position: int
    temperature: float


class ChainEnds(NamedTuple):
    """When the chains of one call end: once the chances of a row's tokens multiply to less than `least`.

    chances: of a token by its probability, 16 classes of equal width. least: per row.
    """

    chances: tuple[float, ...]
    least: Sequence[float]


@dataclass(slots=True)
class Run:
    """Neighbouring slots with equal widths: one attention call."""

    first: int  # index of the first packed token
    slots: range
    starts: list[int]
    width: int
    ancestors: Tensor | None = None  # [W, W] bool, single rows only
    masks: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict)
    index: Tensor | None = None  # [R*W*2*Hkv] places in the cache, for several rows

    @property
    def length(self) -> int:
        return max(self.starts) + self.width


def runs_of(spans: Sequence[Span], parents: Sequence[Sequence[int] | None] | None) -> list[Run]:
    """Group spans into runs."""
    runs: list[Run] = []
    first = 0
    for i, span in enumerate(spans):
        tree = parents[i] if parents else None
        last = runs[-1] if runs else None
        if (
            last is not None
            and not tree
            and last.ancestors is None
            and last.width == span.width
            and last.slots.stop == span.slot
            and span.width <= _MAX_SHARED_WIDTH
        ):
            last.slots = range(last.slots.start, span.slot + 1)
            last.starts.append(span.start)
        else:
            slots = range(span.slot, span.slot + 1)
            ancestors = torch.from_numpy(ancestors_of(tree)) if tree else None
            runs.append(Run(first, slots, [span.start], span.width, ancestors))
        first += span.width
    return runs


def ancestors_of(parents: Sequence[int]) -> np.ndarray:
    """Return [W, W] bool, True if the column's token is on the path to the row's token.

    parents: [W - 1], as in `LanguageModel.forward`.
    """
    is_on_path = np.eye(1 + len(parents), dtype=np.bool_)
    for k, parent in enumerate(parents):
        is_on_path[k + 1] |= is_on_path[parent + 1]
    return is_on_path


class ChainMasks:
    """Additive masks of single chains, sliced from one table per width."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def mask(self, groups: int, width: int, start: int, like: Tensor) -> Tensor:
        """Return [1, 1, G*W, start + W]: token w sees the cached positions and tokens 0 to w."""
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


def build_mask(run: Run, window: int | None, groups: int, like: Tensor) -> Tensor:
    """Return [R, 1, G*W, L] additive: 0 for visible keys, -inf for the others."""
    visible = _visible(run, window, like.device)
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    mask.masked_fill_(~visible, float("-inf"))
    tiled = mask[:, None].expand(-1, groups, -1, -1)
    return tiled.reshape(len(run.slots), 1, groups * run.width, run.length)


def build_biased_mask(
    run: Run, window: int | None, groups: int, like: Tensor, bias: Bias
) -> Tensor:
    """Return [R, Hkv, G*W, L] additive: the heads' biases of visible keys, -inf for the others."""
    keys = _key_positions(run, like.device)
    if callable(bias):
        biases = bias(keys)[:, None]  # [H, 1, L]
    else:
        distances = (_query_positions(run, like.device)[:, :, None] - keys).clamp_min(0)
        biases = bias.by_distance(run.length)[:, distances].transpose(0, 1)  # [R, H, W, L]
    hidden = ~_visible(run, window, like.device)
    mask = biases.to(like.dtype).masked_fill(hidden[:, None], float("-inf"))  # [R, H, W, L]
    return mask.unflatten(1, (-1, groups)).flatten(2, 3)


def mask_sources(lengths: Sequence[int], like: Tensor) -> Tensor:
    """Return [R, 1, 1, S] additive: 0 for the positions of each row's source, -inf for the others."""
    ends = torch.tensor(lengths, device=like.device)[:, None, None, None]
    beyond = torch.arange(max(lengths), device=like.device) >= ends
    return torch.zeros_like(beyond, dtype=like.dtype).masked_fill_(beyond, float("-inf"))


def _visible(run: Run, window: int | None, device: torch.device) -> Tensor:
    """Return [R, W, L] bool: the cached positions that each new token may see."""
    keys = _key_positions(run, device)
    position_of_query = _query_positions(run, device)[:, :, None]
    if run.ancestors is None:
        visible = keys <= position_of_query
    else:
        past = torch.ones(run.width, run.starts[0], dtype=torch.bool, device=device)
        visible = torch.cat([past, run.ancestors.to(device)], dim=1)[None]
    if window is not None:
        visible = visible & (keys > position_of_query - window)
    return visible


def _query_positions(run: Run, device: torch.device) -> Tensor:
    """Return the positions of the new tokens [R, W]."""
    if run.ancestors is not None:
        return _key_positions(run, device)[None, run.starts[0] :]
    starts = torch.tensor(run.starts, device=device)[:, None]
    return starts + torch.arange(run.width, device=device)


def _key_positions(run: Run, device: torch.device) -> Tensor:
    """Return the positions of the keys [L]; in a tree, a node's place is not its position."""
    positions = torch.arange(run.length, device=device)
    if run.ancestors is not None:
        start = run.starts[0]
        positions[start:] = start + run.ancestors.to(device).sum(dim=-1) - 1
    return positions


def store(run: Run, storage: Tensor, new: Tensor) -> None:
    """Write [R*W, 2*Hkv, D] new entries after each row's cached ones.

    storage: [slots, 2*Hkv, positions, D] of a layer.
    """
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
