"""The interfaces between a forward, its rows' cache and the rest of paceline; no layout, no device.

A `KVCache` keeps the keys and values of rows and packs their tokens into a `Batch`; a `Forward` runs a
model's weights over the batch. `language_model.py` chooses the implementations.
Symbols: N packed tokens, W tokens of a row, H query heads, Hkv key-value heads, D head size, V logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.packing import Bias, KeyBias, Span
    from paceline.models.sublayers import LayerSubset


class Batch(Protocol):
    """The packed tokens of one forward: their rows, positions and ancestors. Built once per forward.

    num_positions: no position is higher. only_chain: the positions if all tokens are one row's chain,
    so that slices replace indices. positions: [N] absolute, the span's start plus the token's depth.
    """

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_positions(self) -> int: ...
    def only_chain(self) -> range | None: ...
    def positions(self) -> Tensor: ...

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


class SourceBatch(Batch, Protocol):
    """A batch of rows that have a source."""

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
        """Attend as in `Batch`; the bias may be of the distances from the keys to the query (T5)."""

    def attend_to_source(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Return [N, H, D] attention outputs over the cached sources of the tokens' rows.

        query: [N, H, D].
        """


class KVCache(Protocol):
    """The keys and values of all rows of one model; each row owns a slot from `acquire` to `release`.

    A row's owner keeps the number of its cached positions: to roll back is to forget positions.

    num_rows: slots in use. num_slots: slots that need memory, and with one more after another
    `acquire`. max_length: maximum number of positions per row within the bound, with the current
    rows. block: positions by which a row's memory grows. stores_all_first: whether a forward caches
    all its tokens before any of them attends; if so, no two spans of a forward may belong to one row.

    forget frees a slot's memory; clear removes values that are not finite, so that they cannot reach
    the slot's next row. extend makes room for positions below `num_positions`. bound limits the
    positions of all slots together unless the rows need more (exact_fit: never hold more than the rows
    need, in blocks), and rounded gives the positions of a row that count against it. read copies the
    entries of positions [start, stop), [2 * Hkv, n, D] per layer, and write puts them back.
    copy_positions copies entries at the positions `source`, which ascend, to start, start + 1, ...

    sources is the cache of what an encoder has made of the rows' sources, with the same slots; its
    rows are acquired, released and cleared with these. None for a model without an encoder.

    for_checks returns the cache that self-checks feed: this
    one, or an empty one of small blocks.
    """

    @property
    def sources(self) -> KVCache | None: ...

    @property
    def num_rows(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def num_slots_with_one_more(self) -> int: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def block(self) -> int: ...
    @property
    def stores_all_first(self) -> bool: ...
    def acquire(self) -> int: ...
    def release(self, slot: int) -> None: ...
    def forget(self, slot: int) -> None: ...
    def clear(self, slot: int) -> None: ...
    def extend(self, slot: int, num_positions: int) -> None: ...
    def bound(self, limit: int | None, exact_fit: bool = False) -> None: ...
    def rounded(self, num_positions: int) -> int: ...
    def num_bytes(self) -> int: ...
    def read(self, slot: int, start: int, stop: int) -> list[Tensor]: ...
    def write(self, slot: int, start: int, entries: Sequence[Tensor]) -> None: ...
    def copy_positions(self, slot: int, source: Sequence[int], start: int) -> None: ...
    def for_checks(self) -> KVCache: ...


class BatchCache(KVCache, Protocol):
    """A cache that packs tokens for a forward that runs in torch, layer by layer.

    pack makes room for the spans and returns their token ids [N] on the device and their batch; parents
    as in `LanguageModel.forward`.
    """

    def pack(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None = None,
    ) -> tuple[Tensor, Batch]: ...


class BatchForward(Protocol):
    """The weights of a causal language model, run in torch. kind: `lean` or `transformers`."""

    @property
    def kind(self) -> str: ...

    def hidden(self, tokens: Tensor, batch: Batch, skip: LayerSubset | None = None) -> Tensor:
        """Return final hidden states [N, hidden size] of tokens [N], without the skipped sub-layers."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of final hidden states [..., hidden size]."""
