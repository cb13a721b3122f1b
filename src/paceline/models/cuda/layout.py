"""Rows packed into one forward over a paged cache, as one int64 vector that is copied to the device.

The host lays out everything that the kernel reads of rows and tokens. Tokens of rows of any widths are
adjacent; a batch is padded to a fixed shape with rows of width 0 and tokens whose keys go to block 0,
which no row owns. Symbols: R rows, T packed tokens, W tokens of a row, B words of a token's ancestor
bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.models.packing import ancestors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from paceline.models.packing import Span

BLOCK: Final = 64  # positions of a block of the cache


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The row of every packed token, on the device."""

    table: Tensor  # [slots, blocks per row] int32
    first: Tensor  # [R] index of the row's first packed token
    width: Tensor  # [R] tokens of the row; 0 for a row of padding
    start: Tensor  # [R] cached positions before them
    slot: Tensor  # [R]
    position: Tensor  # [T] start plus depth
    place: Tensor  # [T] place of the token's keys and values in a pool
    bits: Tensor | None  # [T, B] which of its row's tokens a token sees; None: those up to itself
    max_width: int  # no row is wider
    num_positions: int  # no position is higher
    max_length: int | None = None  # no row is longer, with its new tokens; None: unknown


@dataclass(frozen=True, slots=True)
class Shape:
    """The lengths of the parts of a laid-out vector."""

    rows: int
    tokens: int
    words: int  # of ancestor bits per token; 0 where all rows are chains

    @property
    def size(self) -> int:
        return 4 * self.rows + (3 + self.words) * self.tokens

    def read(
        self,
        vector: Tensor,
        table: Tensor,
        max_width: int,
        num_positions: int,
        max_length: int | None = None,
    ) -> tuple[Tensor, PackedRows]:
        """Return the token ids [T] and the rows of a laid-out vector, as views."""
        sizes = [self.rows] * 4 + [self.tokens] * 3 + [self.tokens * self.words]
        first, width, start, slot, ids, position, place, bits = vector.split(sizes)
        rows = PackedRows(
            table, first, width, start, slot, position, place,
            bits.view(self.tokens, self.words) if self.words else None,
            max_width, num_positions, max_length,
        )  # fmt: skip
        return ids, rows


def lay_out(
    into: np.ndarray,
    shape: Shape,
    tokens: Tensor,
    spans: Sequence[Span],
    parents: Sequence[Sequence[int] | None] | None,
    places: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """Write a batch into a vector [shape.size], in the order of `Shape.read`.

    Rows and tokens beyond the batch are zeros: width 0, and a place in block 0. tokens: [N] on the CPU.
    places: (slots, positions) -> places in a pool; the cache must have room for the rows' positions.
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
    place[:num_tokens] = places(slot[row_of], cached_at)
    if not shape.words:
        return
    bits = parts[3 * shape.tokens :].reshape(shape.tokens, shape.words)
    bits[:num_tokens] = _chain_bits(within, shape.words)
    for i, tree in enumerate(parents or ()):
        if tree:
            at = slice(first[i], first[i] + width[i])
            seen = ancestors_of(tree)
            bits[at] = _tree_bits(seen, shape.words)
            position[at] = start[i] + seen.sum(axis=1) - 1


def _chain_bits(within: np.ndarray, num_words: int) -> np.ndarray:
    """Return [T, B]: the token at place w of its row sees places 0 to w."""
    counts = np.clip(within[:, None] + 1 - 64 * np.arange(num_words), 0, 64)
    ones = ~np.uint64(0)
    # a shift by 64 is undefined
    shifted = ones >> (64 - np.maximum(counts, 1)).astype(np.uint64)
    return np.where(counts > 0, shifted, np.uint64(0)).view(np.int64)


def _tree_bits(seen: np.ndarray, num_words: int) -> np.ndarray:
    """Return the words [W, B] of a [W, W] bool matrix."""
    packed = np.packbits(seen, axis=1, bitorder="little")
    whole = np.zeros((len(seen), 8 * num_words), dtype=np.uint8)
    whole[:, : packed.shape[1]] = packed
    return whole.view("<i8")
