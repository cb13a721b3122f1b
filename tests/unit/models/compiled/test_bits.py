"""A token's bits depend on its own row up to its own position alone."""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.compiled_models import (
    compile_model,
    hidden_of,
    path_to,
    prefill,
    random_model,
    random_text,
    random_tree,
)

from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.models.compiled.forward import CompiledForward

MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"hidden_size": 128, "head_dim": 32},
    "one_kv_head": {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 1},
    "no_groups": {"hidden_size": 192, "num_key_value_heads": 4},
    "narrow_window": {"architecture": "mistral", "hidden_size": 128, "sliding_window": 6},
    "wide_window": {"architecture": "mistral", "hidden_size": 128, "sliding_window": 45},
    "mixed_windows": {"architecture": "qwen2", "hidden_size": 128, "sliding_window": 33},
    "norms": {"architecture": "qwen3", "hidden_size": 160, "head_dim": 80},
    "scaled_angles": {"architecture": "llama3", "hidden_size": 256, "head_dim": 64},
}
BIG: dict[str, dict[str, Any]] = {
    "1024": {"hidden_size": 1024, "intermediate_size": 1536, "num_attention_heads": 16},
    "4096": {"hidden_size": 4096, "intermediate_size": 640, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "num_hidden_layers": 1},
}
DTYPES = ("bfloat16", "float32")
GRID = list(itertools.product(MODELS, DTYPES))
LENGTH = 540


@cache
def forward_of(name: str, dtype: str) -> CompiledForward:
    return compile_model(random_model(dtype, **(MODELS | BIG)[name]))


@cache
def whole(name: str, dtype: str, seed: int = 0) -> torch.Tensor:
    """Return the hidden states of random_text(LENGTH, seed), computed alone and at once."""
    return hidden_of(forward_of(name, dtype), random_text(LENGTH, seed))


def in_pieces(forward: CompiledForward, text: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    rows, start, parts = forward.new_cache(), 0, []
    slot = rows.acquire()
    for size in itertools.cycle(sizes):
        piece = text[start : start + size]
        parts.append(forward.hidden(piece, [Span(slot, start, len(piece))], None, rows))
        start += size
        if start >= len(text):
            return torch.cat(parts)
    raise AssertionError


@pytest.mark.parametrize(("name", "dtype"), GRID)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 13, 16, 17, 32, 33, 64, 100, 129, 256, 512])
def test_a_prompt_may_come_in_pieces_of_any_size(name: str, dtype: str, size: int) -> None:
    length = min(LENGTH, 40 * size)
    pieces = in_pieces(forward_of(name, dtype), random_text(LENGTH)[:length], [size])

    assert torch.equal(pieces, whole(name, dtype)[:length])


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_a_prompt_may_come_in_pieces_of_different_sizes(name: str, dtype: str) -> None:
    source = random.Random(name)
    for _ in range(5):
        sizes = [source.choice([1, 2, 5, 9, 30, 64, 65, 200]) for _ in range(30)]
        pieces = in_pieces(forward_of(name, dtype), random_text(LENGTH), sizes)

        assert torch.equal(pieces, whole(name, dtype)), sizes


def check_batch(name: str, dtype: str, starts: Sequence[int], widths: Sequence[int]) -> None:
    """Compare rows of random texts that are computed together with the same rows alone."""
    forward = forward_of(name, dtype)
    rows, texts = (
        forward.new_cache(),
        [random_text(LENGTH, seed % 4) for seed in range(len(starts))],
    )
    slots = [prefill(forward, rows, t[:n]) for t, n in zip(texts, starts, strict=True)]
    order = list(range(len(starts)))
    random.Random(len(starts)).shuffle(order)
    tokens = [token for i in order for token in texts[i][starts[i] : starts[i] + widths[i]]]
    spans = [Span(slots[i], starts[i], widths[i]) for i in order]
    hidden = forward.hidden(tokens, spans, None, rows)

    for i, part in zip(order, hidden.split([widths[i] for i in order]), strict=True):
        expected = whole(name, dtype, i % 4)[starts[i] : starts[i] + widths[i]]
        assert torch.equal(part, expected), (i, starts, widths)


@pytest.mark.parametrize(("name", "dtype"), GRID)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 16])
def test_rows_do_not_depend_on_each_other(name: str, dtype: str, num_rows: int) -> None:
    source = random.Random(f"{name} {num_rows}")
    for widest in (1, 2, 9, 64):
        starts = [source.randrange(LENGTH - 64) for _ in range(num_rows)]
        widths = [source.randint(1, widest) for _ in range(num_rows)]

        check_batch(name, dtype, starts, widths)


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_drafts_may_have_any_width(name: str, dtype: str) -> None:
    forward, rows = forward_of(name, dtype), forward_of(name, dtype).new_cache()
    text = random_text(LENGTH)
    slot = prefill(forward, rows, text[:75])
    for width in range(1, 65):
        span = Span(slot, 75, width)
        hidden = forward.hidden(text[75 : 75 + width], [span], None, rows)

        assert torch.equal(hidden, whole(name, dtype)[75 : 75 + width]), width


def check_tree(forward: CompiledForward, start: int, width: int, seed: int) -> None:
    """Compare tokens of a tree, and what follows its deepest path, with the chains they become."""
    before, nodes = random_text(start, seed), random_text(width, seed + 1)
    parents = random_tree(width, seed)
    rows = forward.new_cache()
    slot = prefill(forward, rows, before)
    hidden = forward.hidden(nodes, [Span(slot, start, width)], [parents], rows)
    paths = [path_to(parents, place) for place in range(width)]
    path = max(paths, key=len)
    for sampled in (path, paths[-1], paths[width // 2]):
        chain = hidden_of(forward, [*before, *(nodes[place] for place in sampled)])
        assert torch.equal(hidden[sampled], chain[start:]), (start, width, seed, parents)
    rows.copy_positions(slot, [start + place for place in path], start)
    accepted = [*before, *(nodes[place] for place in path)]
    following = random_text(5, seed + 2)
    after = forward.hidden(following, [Span(slot, len(accepted), 5)], None, rows)
    expected = hidden_of(forward, [*accepted, *following])[len(accepted) :]
    assert torch.equal(after, expected), (start, width, seed, parents)


@pytest.mark.parametrize(("name", "dtype"), GRID)
@pytest.mark.parametrize("width", [2, 5, 17, 64])
def test_a_path_of_a_tree_is_the_chain_that_it_may_become(
    name: str, dtype: str, width: int
) -> None:
    for start in range(width % 4, 132, 11):  # twelve residues modulo 64
        check_tree(forward_of(name, dtype), start, width, start)


@pytest.mark.wide
@pytest.mark.parametrize(("name", "dtype"), GRID)
@pytest.mark.parametrize("width", [2, 3, 4, 6, 9, 16, 33, 64])
def test_trees_may_begin_anywhere(name: str, dtype: str, width: int) -> None:
    for start in range(130):
        check_tree(forward_of(name, dtype), start, width, 1000 + start)


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_trees_and_chains_share_a_forward(name: str, dtype: str) -> None:
    forward, source = forward_of(name, dtype), random.Random(name)
    for seed in range(6):
        rows, spans, trees, tokens, texts = forward.new_cache(), [], [], [], []
        for k in range(source.randint(2, 6)):
            before = random_text(source.randrange(1, 140), 10 * seed + k)
            width = source.choice([1, 2, 7, 40])
            tree = random_tree(width, seed + k) if k % 2 else None
            spans.append(Span(prefill(forward, rows, before), len(before), width))
            trees.append(tree)
            texts.append((before, random_text(width, seed - k)))
            tokens += texts[-1][1]
        hidden = forward.hidden(tokens, spans, trees, rows).split([s.width for s in spans])
        for part, tree, (before, nodes) in zip(hidden, trees, texts, strict=True):
            last = len(nodes) - 1
            path = path_to(tree, last) if tree else list(range(len(nodes)))
            chain = hidden_of(forward, [*before, *(nodes[place] for place in path)])
            assert torch.equal(part[path], chain[len(before) :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BIG)
def test_large_hidden_sizes(name: str, dtype: str) -> None:
    forward, text = forward_of(name, dtype), random_text(80)
    expected = hidden_of(forward, text)

    assert torch.equal(in_pieces(forward, text, [1, 7, 2, 19]), expected)
    check_tree(forward, 37, 24, 3)
    rows = forward.new_cache()
    slots = [prefill(forward, rows, text[:n]) for n in (11, 60, 33)]
    spans = [Span(s, n, 3) for s, n in zip(slots, (11, 60, 33), strict=True)]
    tokens = [token for n in (11, 60, 33) for token in text[n : n + 3]]
    hidden = forward.hidden(tokens, spans, None, rows)
    assert torch.equal(hidden, torch.cat([expected[n : n + 3] for n in (11, 60, 33)]))


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_logits_do_not_depend_on_their_number(name: str, dtype: str) -> None:
    forward = forward_of(name, dtype)
    hidden = whole(name, dtype)[:150]
    logits = forward.logits(hidden)

    for size in (1, 2, 5, 16, 40, 130):
        parts = [forward.logits(part) for part in hidden.split(size)]
        assert torch.equal(torch.cat(parts), logits), size
    rows = forward.new_cache()
    span = Span(rows.acquire(), 0, 150)
    scores = forward.score(random_text(LENGTH)[:150], [span], None, rows)
    assert scores.logits is not None and torch.equal(scores.logits, logits)
