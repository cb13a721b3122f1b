"""The kernel over a paged cache equals the plain attention over a row cache, feature by feature."""

from __future__ import annotations

import os
import random

import pytest
import torch

pytest.importorskip("triton")

from paceline.models.cache import RowCache
from paceline.models.cuda.layout import BLOCK
from paceline.models.cuda.paged_attention import attend_blocks
from paceline.models.cuda.paged_cache import PagedCache
from paceline.models.packing import KeyBias, Span

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"
DEVICE = torch.device("cuda" if COMPILED else "cpu")


def random_tree(width: int, order: random.Random) -> list[int]:
    """Return the parents [W - 1] of a random tree."""
    return [order.randrange(-1, k) for k in range(width - 1)]


class Pair:
    """The same rows in both caches; every forward is compared."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape = heads, kv_heads, head_dim
        self.dtype = dtype
        self.plain, self.paged = RowCache(DEVICE), PagedCache(DEVICE)
        self.generator = torch.Generator().manual_seed(0)

    def acquire(self) -> int:
        slot = self.plain.acquire()
        assert self.paged.acquire() == slot
        return slot

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.dtype)

    def fill(self, slot: int, length: int) -> None:
        """Cache random entries of a text."""
        entries = [self.random(2 * self.shape[1], length, self.shape[2])]
        self.plain.write(slot, 0, entries)
        self.paged.write(slot, 0, entries)

    def check(
        self,
        spans: list[Span],
        trees: list[list[int] | None] | None = None,
        window: int | None = None,
        cap: float | None = None,
        num_splits: int | None = None,
        bias: KeyBias | None = None,
    ) -> None:
        heads, kv_heads, head_dim = self.shape
        num_tokens = sum(span.width for span in spans)
        # queries as the lean forward hands them over: a slice of a wider tensor
        query = self.random(num_tokens, heads + kv_heads, head_dim)[:, :heads]
        new = self.random(num_tokens, 2 * kv_heads, head_dim)
        tokens = torch.zeros(num_tokens, dtype=torch.int64)
        _, plain = self.plain.pack(tokens, spans, trees)
        expected = plain.attend(0, query, new, 0.3, window, cap, bias)

        _, batch = self.paged.pack(tokens, spans, trees)
        pool = self.paged.layer(0, new)
        pool.index_copy_(0, batch.rows.place, new)
        biases = None if bias is None else batch._biases(bias)
        found = attend_blocks(query, pool, batch.rows, 0.3, window, cap, num_splits, biases)

        assert torch.equal(batch.positions(), plain.positions())
        tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (2, 2, 16, torch.float32),
        (4, 1, 16, torch.bfloat16),
        (6, 2, 8, torch.float32),
        (4, 2, 24, torch.bfloat16),
        (2, 1, 64, torch.float32),
    ],
    ids=["all heads alike", "one for all", "three to one", "odd head size", "wide"],
)
def test_ragged_rows(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    pair = Pair(heads, kv_heads, head_dim, dtype)
    a, b, c = (pair.acquire() for _ in range(3))
    pair.fill(a, 2 * BLOCK + 7)
    pair.fill(b, 3)
    pair.fill(c, BLOCK)
    pair.check([Span(a, 2 * BLOCK + 7, 1), Span(b, 3, 1), Span(c, BLOCK, 1)])
    pair.check([Span(c, BLOCK + 1, 5), Span(a, 2 * BLOCK + 8, 3)], num_splits=1)
    pair.check([Span(c, BLOCK + 1, 5), Span(a, 2 * BLOCK + 8, 3)], num_splits=2)


@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_of_several_tiles_and_blocks(window: int | None) -> None:
    pair = Pair(2, 1, 16)
    a, b = pair.acquire(), pair.acquire()
    pair.check([Span(a, 0, BLOCK + 7), Span(b, 0, 3)], window=window)
    pair.check([Span(b, 3, 4), Span(a, BLOCK + 7, BLOCK)], window=window, num_splits=2)


@pytest.mark.parametrize(
    ("window", "cap", "num_splits"),
    [(None, 2.0, 1), (3, None, 4), (70, None, 1), (70, 2.0, 3), (None, None, 3)],
)
def test_trees_windows_and_caps(window: int | None, cap: float | None, num_splits: int) -> None:
    pair = Pair(4, 2, 16)
    order = random.Random(0)
    a, b, c = (pair.acquire() for _ in range(3))
    lengths = {a: 2 * BLOCK + 60, b: 2, c: BLOCK}
    for slot, length in lengths.items():
        pair.fill(slot, length)
    spans = [Span(s, lengths[s], w) for s, w in zip((a, b, c), (9, 5, 4), strict=True)]
    trees = [random_tree(9, order), None, random_tree(4, order)]
    pair.check(spans, trees, window, cap, num_splits)


@pytest.mark.parametrize("window", [None, 4])
def test_a_tree_of_more_nodes_than_a_word_has_bits(window: int | None) -> None:
    pair = Pair(1, 1, 16)
    a, b = pair.acquire(), pair.acquire()
    pair.fill(a, 50)
    pair.fill(b, 70)
    tree = random_tree(100, random.Random(1))
    pair.check([Span(b, 70, 66), Span(a, 50, 100)], [None, tree], window)


def alibi(positions: torch.Tensor) -> torch.Tensor:
    """Return the biases of four heads."""
    slopes = torch.tensor([0.02, 0.3, 0.005, 0.1], device=positions.device)
    return slopes[:, None] * positions


@pytest.mark.parametrize(
    ("window", "cap", "num_splits"), [(None, None, 1), (70, None, 3), (None, 2.0, 2)]
)
def test_biases_by_position(window: int | None, cap: float | None, num_splits: int) -> None:
    pair = Pair(4, 2, 16)
    a, b, c = (pair.acquire() for _ in range(3))
    lengths = {a: 2 * BLOCK + 60, b: 2, c: BLOCK}
    for slot, length in lengths.items():
        pair.fill(slot, length)
    spans = [Span(s, lengths[s], w) for s, w in zip((a, b, c), (9, 5, 4), strict=True)]
    trees = [random_tree(9, random.Random(0)), None, None]
    pair.check(spans, trees, window, cap, num_splits, alibi)
    pair.check([Span(a, lengths[a], 3), Span(b, 2, 1)], None, window, cap, num_splits, alibi)


def test_earlier_entries_of_a_block_do_not_matter() -> None:
    pair = Pair(2, 2, 16)
    a, b = pair.acquire(), pair.acquire()
    pair.fill(a, 10)
    pair.fill(b, BLOCK)
    pair.paged.layers[0][:] = torch.nan  # type: ignore[index]
    pair.fill(a, 9)
    pair.fill(b, BLOCK - 1)

    pair.check([Span(a, 9, 1), Span(b, BLOCK - 1, 4)], num_splits=2)
    pair.check([Span(a, 9, 1), Span(b, BLOCK - 1, 4)], num_splits=1)


def test_nan_is_not_lost_among_splits() -> None:
    paged = PagedCache(DEVICE)
    slot = paged.acquire()
    tokens = torch.zeros(1, dtype=torch.int64)
    _, batch = paged.pack(tokens, [Span(slot, 3 * BLOCK, 1)])
    pool = paged.layer(0, torch.zeros(1, 2, 16, device=DEVICE))
    pool[paged.places_on_device(slot, torch.tensor([BLOCK], device=DEVICE))] = torch.nan

    out = attend_blocks(torch.ones(1, 1, 16, device=DEVICE), pool, batch.rows, 1.0, num_splits=4)

    assert out.isnan().all()
