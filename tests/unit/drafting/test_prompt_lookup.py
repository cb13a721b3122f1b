"""Lookup finds the longest earlier match, the latest of equals, and copies token by token."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_index import SuffixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXTS = st.lists(st.integers(0, 3), max_size=40)
QUICK = settings(max_examples=300, deadline=None, derandomize=True)


def row_of(id: int, tokens: Sequence[int] = (), num_prompt: int = 0) -> SimpleRow:
    return SimpleRow(list(tokens), num_prompt, id=id)


def draft_of(drafter: PromptLookup, text: Sequence[int], limit: int) -> list[int]:
    """Return the draft of a new row."""
    row = row_of(0, text)
    drafter.start([row])
    drafts = drafter.propose([row], [limit])
    return drafts.tokens[0, : drafts.lengths[0]].tolist()


def naive_match(tokens: list[int], min_ngram: int, max_ngram: int) -> int | None:
    """Return the end of the latest of the longest earlier occurrences of a suffix, by trying all."""
    n = len(tokens)
    for length in range(min(max_ngram, n - 1), min_ngram - 1, -1):
        suffix = tokens[n - length :]
        for end in range(n - 1, length - 1, -1):
            if tokens[end - length : end] == suffix:
                return end
    return None


@QUICK
@given(TEXTS.filter(len), st.integers(1, 5), st.integers(0, 6))
def test_the_match_is_that_of_a_naive_search(text: list[int], least: int, more: int) -> None:
    index = SuffixIndex(least + more)
    index.extend(text)

    found = index.match_own()
    assert (found.source if found.length >= least else None) == naive_match(
        text, least, least + more
    )


@QUICK
@given(TEXTS, st.integers(0, 12), st.integers(1, 4))
def test_drafts_equal_copies_token_by_token(text: list[int], limit: int, min_ngram: int) -> None:
    drafter = PromptLookup("x", PromptLookupSettings(num_draft_tokens=9, min_ngram=min_ngram))

    draft = draft_of(drafter, text, limit)

    source = naive_match(text, min_ngram, 16) if len(text) > 1 else None
    expected = list(text)
    if source is not None:
        for place in range(source, source + min(limit, 9)):
            expected.append(expected[place])
    assert draft == expected[len(text) :]


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2]),
        ([1, 2, 9, 1, 2, 7, 1, 2], [7, 1, 2, 7]),  # the latest of equally long ones
        ([5, 1, 2, 9, 8, 1, 2, 7, 5, 1, 2], [9, 8, 1, 2]),  # the longest before the latest
        ([6, 6, 6], [6, 6, 6, 6]),
        ([1, 2, 3], []),
        ([1], []),
        ([], []),
    ],
)
def test_examples(text: list[int], draft: list[int]) -> None:
    drafter = PromptLookup("x", PromptLookupSettings(num_draft_tokens=4, min_ngram=2))

    assert draft_of(drafter, text, 10) == draft


# --- rows -----------------------------------------------------------------------------------------


def reference_draft(tokens: list[int], limit: int, config: PromptLookupSettings) -> list[int]:
    """Return the copy, token by token, from a naive search's match, as long as the settings allow."""
    source = naive_match(tokens, config.min_ngram, config.max_ngram)
    expected = list(tokens)
    if source is not None:
        for place in range(source, source + min(limit, config.num_draft_tokens)):
            expected.append(expected[place])
    return expected[len(tokens) :]


FIBONACCI = [[0], [0, 1]]
while len(FIBONACCI[-1]) < 300:
    FIBONACCI.append([*FIBONACCI[-1], *FIBONACCI[-2]])


@pytest.mark.parametrize(
    "text",
    [
        [0] * 300,
        [0, 1] * 150,
        [0, 1, 1] * 60 + [2] + [0, 1, 1] * 40,
        FIBONACCI[-1][:300],
        random.Random(1).choices(range(2), k=300),
        random.Random(2).choices(range(5), k=300),
        random.Random(3).choices(range(100), k=150) * 2,
    ],
    ids=["same", "alternating", "periods", "fibonacci", "two", "five", "hundred"],
)
@pytest.mark.parametrize("bounds", [(1, 1), (1, 16), (3, 4)])
def test_drafts_are_those_of_a_naive_search_after_any_history(
    text: list[int], bounds: tuple[int, int]
) -> None:
    config = PromptLookupSettings(num_draft_tokens=6, min_ngram=bounds[0], max_ngram=bounds[1])
    drafter = PromptLookup("x", config)
    choose = random.Random(str(bounds))
    rows = [row_of(0, text[:1]), row_of(1, text[:40])]
    drafter.start(rows)
    while not drafter.prepare(rows[1], 7):
        pass
    num_drafted = 0
    while any(len(row.tokens) < len(text) for row in rows):
        for row in rows:
            row.tokens += text[len(row.tokens) : len(row.tokens) + choose.randrange(1, 9)]
        if choose.random() < 0.1:  # another drafter in between
            drafter.finish(rows)
            drafter.start(rows)
        asked = choose.sample(rows, choose.randint(1, 2))
        limits = [choose.randrange(9) for _ in asked]
        drafts = drafter.propose(asked, limits)
        assert drafts.parents is None and drafts.probs is None
        for i, (row, limit) in enumerate(zip(asked, limits, strict=True)):
            draft = drafts.tokens[i, : drafts.lengths[i]].tolist()
            assert draft == reference_draft(row.tokens, limit, config)
            num_drafted += len(draft)
    assert num_drafted > 0


def test_finished_rows_leave_nothing_behind() -> None:
    drafter = PromptLookup("x", PromptLookupSettings())
    row = row_of(0, [1, 2, 3, 1, 2])
    drafter.start([row])
    drafter.propose([row], [4])
    assert drafter.num_bytes() > 0

    drafter.finish([row, row_of(7)])

    assert drafter.num_bytes() == 0
