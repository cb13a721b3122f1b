"""Rows packed into one forward over a paged cache: the twin of `packing.PackedBatch`.

Everything the kernel reads of rows and tokens is one int64 vector, laid out on the host and copied to
the device at once. Tokens of rows of any widths lie one behind the other; what pads a batch to a fixed
shape is a row of width 0 or a token whose keys go to the block that belongs to nobody.
Symbols: R rows, T packed tokens, B words of a token's ancestor bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache as cached
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.cuda.paged_cache import PagedCache
    from paceline.models.packing import KeyBias, Span


@cached
def attention_kernel() -> Any:
    """The kernel's caller. Raises ModelError where triton is missing."""
    try:
        from paceline.models.cuda.paged_attention import attend_blocks
    except ImportError as error:
        raise ModelError(
            f"CUDA needs triton, which torch's CUDA builds bring along ({error}); "
            "run `pip install triton`, or set device: cpu"
        ) from error
    return attend_blocks


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Which row every packed token belongs to, on the device. Built once a forward."""

    cache: PagedCache
    first: Tensor  # [R] index of the row's first packed token
    width: Tensor  # [R] tokens of the row; 0 for a row that pads
    start: Tensor  # [R] cached positions before them
    slot: Tensor  # [R]
    position: Tensor  # [T] start plus depth
    place: Tensor  # [T] where in a pool the token's keys and values go
    bits: Tensor | None  # [T, B] which of its row's tokens a token sees; None: those up to itself
    most_wide: int  # no row is wider
    num_positions: int  # no position is higher
    longest: int | None = None  # no row is longer, cached and new tokens together; None: unknown
    biases: dict[KeyBias, Tensor] = field(default_factory=dict)  # filled on demand

    @property
    def num_tokens(self) -> int:
        return len(self.position)

    def only_chain(self) -> None:
        """One row's chain is nothing special here."""

    def positions(self) -> Tensor:
        """[T] absolute positions."""
        return self.position

    def attend(
        self,
        layer: int,
        query: Tensor,
        key_value: Tensor,
        scale: float,
        window: int | None,
        cap: float | None,
        bias: KeyBias | None = None,
    ) -> Tensor:
        """Cache the new keys and values, return [T, H, D]; arguments as in `attention.attend`."""
        pool = self.cache.layer(layer, key_value)
        pool.index_copy_(0, self.place, key_value)
        biases = None if bias is None else self._biases(bias)
        out: Tensor = attention_kernel()(query, pool, self, scale, window, cap, biases=biases)
        return out

    def _biases(self, bias: KeyBias) -> Tensor:
        """Return the biases [H, L] of all positions, the same in every layer."""
        if bias not in self.biases:
            positions = torch.arange(self.num_positions + 1, device=self.position.device)
            self.biases[bias] = bias(positions).float().contiguous()
        return self.biases[bias]


@dataclass(frozen=True, slots=True)
class Shape:
    """How long the parts of a laid-out vector are."""

    rows: int
    tokens: int
    words: int  # of ancestor bits a token; 0 where all rows are chains

    @property
    def size(self) -> int:
        return 4 * self.rows + (3 + self.words) * self.tokens

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views: first, width, start, slot [R]; token ids, position, place [T]; bits [T, B]."""
        sizes = [self.rows] * 4 + [self.tokens] * 3 + [self.tokens * self.words]
        parts = list(vector.split(sizes))
        parts[-1] = parts[-1].view(self.tokens, self.words)
        return parts


def lay_out(
    into: np.ndarray,
    shape: Shape,
    tokens: Tensor,
    spans: Sequence[Span],
    ancestors: Sequence[Tensor | None] | None,
    cache: PagedCache,
) -> None:
    """Write a batch into a vector [shape.size], in the order of `Shape.split`.

    Rows and tokens beyond the batch are zeros: width 0, and a place in block 0. tokens: [N] on the CPU.
    The rows' positions must have been made room for.
    """
    num_rows, num_tokens, rows = len(spans), len(tokens), shape.rows
    width = np.array([span.width for span in spans])
    start = np.array([span.start for span in spans])
    slot = np.array([span.slot for span in spans])
    first = width.cumsum() - width
    row_of = np.repeat(np.arange(num_rows), width)
    within = np.arange(num_tokens) - first[row_of]
    cached_at = start[row_of] + within
    into.fill(0)
    for k, values in enumerate((first, width, start, slot)):
        into[k * rows : k * rows + num_rows] = values
    parts = into[4 * rows :]
    position = parts[shape.tokens : shape.tokens + num_tokens]
    parts[:num_tokens] = tokens.numpy()
    position[:] = cached_at
    place = parts[2 * shape.tokens :]
    place[:num_tokens] = cache.places(slot[row_of], cached_at)
    if not shape.words:
        return
    bits = parts[3 * shape.tokens :].reshape(shape.tokens, shape.words)
    bits[:num_tokens] = _chain_bits(within, shape.words)
    for i, tree in enumerate(ancestors or ()):
        if tree is not None:
            at = slice(first[i], first[i] + width[i])
            seen = tree.cpu().numpy()
            bits[at] = _tree_bits(seen, shape.words)
            position[at] = start[i] + seen.sum(axis=1) - 1


def _chain_bits(within: np.ndarray, num_words: int) -> np.ndarray:
    """[T, B]: the token at place w of its row sees places 0 to w."""
    counts = np.clip(within[:, None] + 1 - 64 * np.arange(num_words), 0, 64)
    ones = ~np.uint64(0)
    # a shift by 64 is undefined
    shifted = ones >> (64 - np.maximum(counts, 1)).astype(np.uint64)
    return np.where(counts > 0, shifted, np.uint64(0)).view(np.int64)


def _tree_bits(seen: np.ndarray, num_words: int) -> np.ndarray:
    """[W, B] of a [W, W] bool matrix."""
    packed = np.packbits(seen, axis=1, bitorder="little")
    whole = np.zeros((len(seen), 8 * num_words), dtype=np.uint8)
    whole[:, : packed.shape[1]] = packed
    return whole.view("<i8")


def batch_of(
    tokens: Tensor,
    spans: Sequence[Span],
    ancestors: Sequence[Tensor | None] | None,
    cache: PagedCache,
    device: torch.device,
) -> tuple[Tensor, PagedBatch]:
    """Token ids [N] on the device, and the batch in just the shape that it has."""
    for span in spans:
        cache.extend(span.slot, span.start + span.width)
    most_wide = max(span.width for span in spans)
    trees = ancestors is not None and any(tree is not None for tree in ancestors)
    shape = Shape(len(spans), len(tokens), -(-most_wide // 64) if trees else 0)
    vector = torch.empty(shape.size, dtype=torch.int64)
    lay_out(vector.numpy(), shape, tokens, spans, ancestors, cache)
    first, width, start, slot, ids, position, place, bits = shape.split(vector.to(device))
    longest = max(span.start + span.width for span in spans)
    return ids, PagedBatch(
        cache,
        first,
        width,
        start,
        slot,
        position,
        place,
        bits if trees else None,
        most_wide,
        num_positions=longest,
        longest=longest,
    )
