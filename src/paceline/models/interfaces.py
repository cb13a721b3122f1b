"""What a forward, its rows' cache and the rest of paceline know of each other; no layout, no device.

A `KVCache` keeps the keys and values of rows and packs their tokens into a `Batch`; a `Forward` runs a
model's weights over the batch. `language_model.py` chooses the implementations.
Symbols: N packed tokens, W tokens of a row, H query heads, Hkv key-value heads, D head size, V logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.packing import KeyBias, Span
    from paceline.models.sublayers import LayerSubset


class Batch(Protocol):
    """The packed tokens of one forward: their rows, positions and ancestors. Built once per forward."""

    @property
    def num_tokens(self) -> int:
        """N."""

    @property
    def num_positions(self) -> int:
        """No position is higher."""

    def only_chain(self) -> range | None:
        """Return the positions if all tokens are one row's chain, so that slices replace indices."""

    def positions(self) -> Tensor:
        """Return [N] absolute positions: the span's start plus the token's depth."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key_value: Tensor,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        bias: KeyBias | None = None,
    ) -> Tensor:
        """Cache the new keys and values of a layer and return [N, H, D] attention outputs.

        query: [N, H, D], rotated. key_value: [N, 2 * Hkv, D], the rotated keys of all heads and then
        the values. scale: of the scores. window: number of positions that a token sees. cap: scores
        pass through cap * tanh(score / cap). bias: function of the keys' positions, added to the
        scaled scores (ALiBi).
        """


class KVCache(Protocol):
    """The keys and values of all rows of one model; each row owns a slot.

    The number of positions that a row has cached is kept by its owner: to roll back is to forget
    positions.
    """

    @property
    def num_rows(self) -> int:
        """Slots in use."""

    @property
    def num_slots(self) -> int:
        """Slots that need memory."""

    @property
    def num_slots_with_one_more(self) -> int:
        """`num_slots` after another `acquire`."""

    @property
    def max_length(self) -> int | None:
        """Maximum number of positions per row within the bound, with the current rows."""

    @property
    def block(self) -> int:
        """Positions by which a row's memory grows."""

    @property
    def stores_all_first(self) -> bool:
        """Whether a forward caches all its tokens before any of them attends.

        If so, no two spans of one forward may belong to one row.
        """

    def acquire(self) -> int:
        """Return the lowest free slot and take it."""

    def release(self, slot: int) -> None:
        """Give a slot back."""

    def forget(self, slot: int) -> None:
        """Free a row's memory; its keys and values are lost."""

    def clear(self, slot: int) -> None:
        """Remove values that are not finite, so that they cannot reach the slot's next row."""

    def extend(self, slot: int, num_positions: int) -> None:
        """Make room for a row's positions below `num_positions`."""

    def bound(self, limit: int | None, exact_fit: bool = False) -> None:
        """Hold at most `limit` positions of all slots together, unless the rows need more.

        exact_fit: never hold more than the rows need, in blocks, for owners that count bytes.
        """

    def rounded(self, num_positions: int) -> int:
        """Return the positions that count against the bound for a row of `num_positions`."""

    def num_bytes(self) -> int:
        """Return the bytes held now."""

    def read(self, slot: int, start: int, stop: int) -> list[Tensor]:
        """Copy a row's entries at positions [start, stop): [2 * Hkv, n, D] of every layer."""

    def write(self, slot: int, start: int, entries: Sequence[Tensor]) -> None:
        """Put the entries that `read` returned at positions start, start + 1, ... of a row."""

    def copy_positions(self, slot: int, source: Tensor, start: int) -> None:
        """Copy a row's entries at positions `source` [n] to start, start + 1, ..."""

    def pack(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        ancestors: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, Batch]:
        """Make room for the spans and return their token ids [N] on the device, and their batch.

        ancestors: per span None for a chain, or [W, W] bool, see `LanguageModel.forward`.
        """

    def for_checks(self) -> KVCache:
        """Return the cache that self-checks feed: this one, or an empty one of small blocks."""


class Forward(Protocol):
    """The weights of a causal language model, run over packed rows."""

    @property
    def kind(self) -> str:
        """`lean` or `transformers`."""

    def hidden(self, tokens: Tensor, batch: Batch, skip: LayerSubset | None = None) -> Tensor:
        """Return final hidden states [N, hidden size] of tokens [N], without the skipped sub-layers."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of final hidden states [..., hidden size]."""
