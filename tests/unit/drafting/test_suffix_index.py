"""The automaton gives the same matches and counts as a naive search, for every order of appends."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting import suffix_kernels
from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.evidence import NUM_EVIDENCE
from paceline.drafting.suffix_index import Match, RowIndices, SuffixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

SCANNED = 32  # distinct continuations considered
QUICK = settings(max_examples=250, deadline=None, derandomize=True)
TEXTS = st.one_of(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.sampled_from([0, 1]), max_size=60),
    # a text of repeated pieces
    st.lists(st.sampled_from([(1, 2, 3), (1, 2, 4), (5,), (2, 2)]), max_size=20).map(
        lambda pieces: [token for piece in pieces for token in piece]
    ),
)


# --- the readable twin ----------------------------------------------------------------------------


def places_after(text: list[int], context: list[int]) -> list[int]:
    """Return every index of `text` right after an occurrence of `context`."""
    m = len(context)
    return [i for i in range(m, len(text)) if text[i - m : i] == context]


def longest_context(text: list[int], suffix: list[int], max_match: int) -> list[int]:
    """Return the longest suffix of `suffix`, within the bound, that a token of `text` follows."""
    context = suffix[len(suffix) - min(len(suffix), max_match) :]
    while context and not places_after(text, context):
        context = context[1:]
    return context


@dataclass
class NaiveNode:
    token: int
    parent: int
    level: int
    probability: float
    context: list[int]


def naive_tree(
    text: list[int],
    suffix: list[int],
    num_tokens: int,
    max_match: int,
    min_match: int = 1,
    depth: int = 64,
    paths: int = 64,
    min_probability: float = 0.0,
) -> list[NaiveNode]:
    """Return the tree after `suffix` by counting every occurrence in `text`."""
    nodes: list[NaiveNode] = []
    waiting: list[NaiveNode] = []
    parents_of_leaves: set[int] = set()
    leaves = 0

    def expand(parent: int, level: int, probability: float, string: list[int]) -> None:
        context = longest_context(text, string, max_match)
        if level == depth or len(context) < min_match:
            return
        places = places_after(text, context)
        # the tokens that followed, the latest first
        followers = list(dict.fromkeys(text[i] for i in reversed(places)))[:SCANNED]
        for token in followers:
            p = probability * (sum(text[i] == token for i in places) / len(places))
            if p >= min_probability and token >= 0:
                waiting.append(NaiveNode(token, parent, level + 1, p, [*context, token]))
        waiting.sort(key=lambda node: -node.probability)  # stable: earlier ones first among equals

    expand(-1, 0, 1.0, suffix)
    while waiting and len(nodes) < num_tokens:
        node = waiting.pop(0)
        opens = node.parent in parents_of_leaves or not nodes
        if opens and leaves == paths:
            continue
        leaves += opens
        parents_of_leaves.add(node.parent)
        nodes.append(node)
        expand(len(nodes) - 1, node.level, node.probability, node.context)
    return nodes


# --- the tests ------------------------------------------------------------------------------------


def index_of(text: list[int], max_match: int, pieces: int = 1) -> SuffixIndex:
    index = SuffixIndex(max_match)
    for start in range(0, len(text), pieces):
        index.extend(text[start : start + pieces])
    return index


def grown(index: SuffixIndex, found: Match, num_tokens: int, **how: float) -> tuple[object, ...]:
    tokens, parents, evidence = np.full((3, num_tokens), -7, dtype=np.int64)
    how = {"min_match": 1, "depth": 64, "paths": 64, "min_probability": 0.0, **how}
    n, num_leaves, expected = suffix_kernels.grow(
        index._automaton, found.state, found.length, *how.values(), tokens, parents, evidence
    )
    assert set(tokens[n:]) | set(parents[n:]) <= {-7}
    assert set(evidence[:n]) <= set(range(NUM_EVIDENCE))
    return tokens[:n].tolist(), parents[:n].tolist(), num_leaves, expected


def assert_same_tree(
    index: SuffixIndex,
    max_match: int,
    found: Match,
    text: list[int],
    suffix: list[int],
    n: int,
    **how: float,
) -> int:
    expected = naive_tree(text, suffix, n, max_match, **how)
    tokens, parents, leaves, probability = grown(index, found, n, **how)
    assert tokens == [node.token for node in expected]
    assert parents == [node.parent for node in expected]
    assert leaves == len(set(range(len(tokens))) - set(parents))
    total = 0.0
    for node in expected:  # not `sum`, which rounds differently from Python 3.12 on
        total += node.probability
    assert probability == total
    return len(expected)


@QUICK
@given(TEXTS, st.integers(1, 9), st.integers(1, 7))
def test_the_match_is_the_longest_and_its_source_the_latest(
    text: list[int], max_match: int, pieces: int
) -> None:
    found = index_of(text, max_match, pieces).match_own()

    context = longest_context(text, text, max_match)
    assert found.length == len(context)
    if context:
        assert found.source == places_after(text, context)[-1]


@QUICK
@given(
    TEXTS,
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 12),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
)
def test_the_tree_is_that_of_counting_every_occurrence(
    text: list[int],
    max_match: int,
    min_match: int,
    num_tokens: int,
    depth: int,
    paths: int,
    min_probability: float,
) -> None:
    index = index_of(text, max_match)
    how = {"min_match": min_match, "depth": depth, "paths": paths}
    how["min_probability"] = min_probability

    assert_same_tree(index, max_match, index.match_own(), text, text, num_tokens, **how)


@QUICK
@given(TEXTS, TEXTS, st.integers(1, 6), st.integers(1, 12))
def test_another_texts_suffix_is_matched_and_continued_as_well(
    text: list[int], other: list[int], max_match: int, num_tokens: int
) -> None:
    index = index_of(text, max_match)

    suffix = np.array(other[-max_match:], dtype=np.int32)
    found = Match(*suffix_kernels.match(index._automaton, suffix))

    assert found.length == len(longest_context(text, other, max_match))
    assert_same_tree(index, max_match, found, text, other, num_tokens)


@pytest.mark.parametrize("vocabulary", [2, 5, 300])
def test_a_long_text_grows_its_index_many_times_over(vocabulary: int) -> None:
    choose = random.Random(vocabulary)
    text: list[int] = []
    index = SuffixIndex(6)
    grown_tokens = 0
    while len(text) < 1500:
        if text and choose.random() < 0.3:  # repeat a part
            start = choose.randrange(len(text))
            piece = text[start : start + choose.randrange(1, 40)]
        else:
            piece = [choose.randrange(vocabulary) for _ in range(choose.randrange(1, 20))]
        text += piece
        index.extend(piece)
        if choose.random() < 0.2:
            how = {"min_probability": 0.05, "paths": 4}
            grown_tokens += assert_same_tree(index, 6, index.match_own(), text, text, 12, **how)
    assert index.num_tokens == len(text)
    assert grown_tokens > 100


def test_of_many_continuations_the_latest_are_considered() -> None:
    # 7 was followed by 0 often and long ago, then by forty others, once each
    text = [7, 0] * 50 + [t for other in range(100, 140) for t in (7, other)] + [7]
    index = index_of(text, 1)

    tokens, *_ = grown(index, index.match_own(), 64, depth=1)

    assert tokens == list(range(139, 139 - SCANNED, -1))
    assert_same_tree(index, 1, index.match_own(), text, text, 64, depth=1)


def test_a_match_at_the_end_of_the_text_continues_periodically() -> None:
    index = index_of([9, 1, 2, 3, 1, 2, 3], 8)

    assert grown(index, index.match_own(), 7)[0] == [1, 2, 3, 1, 2, 3, 1]


def test_num_bytes_counts_every_array_and_grows_with_the_text() -> None:
    index = SuffixIndex(4)
    before = index.num_bytes()
    held = (index._header, index._text, index._states, index._edges, index._table)
    assert before == sum(array.nbytes for array in held)

    index.extend(range(10_000))

    assert index.num_bytes() > 50 * before
    assert index.num_bytes() / index.num_tokens < 300


# --- rows -----------------------------------------------------------------------------------------


def row_of(id: int, tokens: Sequence[int] = (), num_prompt: int = 0) -> SimpleRow:
    return SimpleRow(list(tokens), num_prompt, id=id)


def test_a_row_is_read_up_to_its_end_after_a_pause() -> None:
    choose = random.Random(4)
    rows = [row_of(i, [choose.randrange(3)]) for i in range(3)]
    indices = RowIndices(5)
    indices.start(rows)
    for _ in range(60):
        for row in rows:
            row.tokens += [choose.randrange(3) for _ in range(choose.randrange(1, 5))]
        for row in choose.sample(rows, 2):
            found, index = indices.match_own(row), indices.index(row)
            assert index.num_tokens == len(row.tokens)
            assert found == index.match_own()
            assert_same_tree(index, 5, found, row.tokens, row.tokens, 6)
        for row in rows:
            found = indices.match_own(row)
            assert found == index_of(row.tokens, 5).match_own()
            assert indices.index(row).num_tokens == len(row.tokens)


def test_an_id_that_starts_again_is_another_text() -> None:
    indices = RowIndices(5)
    first, second = row_of(-2, [1, 2, 3, 1, 2, 3]), row_of(-2, [4, 4, 4])
    indices.start([first])
    indices.match_own(first)
    indices.start([second])

    found = indices.match_own(second)
    assert found == index_of(second.tokens, 5).match_own()


def test_a_text_for_which_there_was_no_memory_is_read_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = row_of(0, [1, 2, 3] * 20)
    indices = RowIndices(5)
    indices.start([row])
    indices.match_own(row)
    row.tokens += [1, 2, 4] * 200
    before = indices.num_bytes()

    def fail(*args: object, **settings: object) -> None:
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr(np, "full", fail)  # the last of the arrays
        with pytest.raises(MemoryError):
            indices.match_own(row)

    assert indices.num_bytes() == before  # machine code has the addresses of these arrays
    assert indices.match_own(row) == index_of(row.tokens, 5).match_own()


def test_preparing_reads_a_long_prompt_in_pieces() -> None:
    row = row_of(0, list(range(50)) * 2)
    indices = RowIndices(5)
    indices.start([row])
    assert indices.num_bytes() == 0  # the text is read when it is needed

    done = [indices.prepare(row, 30) for _ in range(4)]

    assert done == [False, False, False, True]
    assert indices.num_bytes() > 0
    found = indices.match_own(row)
    assert found.source == 50
    indices.finish([row, row_of(8)])
    assert indices.num_bytes() == 0
