"""Lookup finds the longest earlier match, the latest of equals, and copies as token by token would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.prompt_lookup import (
    PromptLookup,
    PromptLookupSettings,
    longest_suffix_match,
)

TEXTS = st.lists(st.integers(0, 3), max_size=40)
QUICK = settings(max_examples=300, deadline=None, derandomize=True)


def naive_match(tokens: list[int], min_ngram: int, max_ngram: int) -> int | None:
    """Where the latest of the longest earlier occurrences of a suffix ends, by trying all."""
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
    found = longest_suffix_match(np.array(text), least, least + more)

    assert found == naive_match(text, least, least + more)


@QUICK
@given(TEXTS, st.integers(0, 12), st.integers(1, 4))
def test_drafts_copy_what_copying_token_by_token_would(
    text: list[int], limit: int, min_ngram: int
) -> None:
    drafter = PromptLookup("x", PromptLookupSettings(num_draft_tokens=9, min_ngram=min_ngram))

    draft = drafter.draft(np.array(text, dtype=np.int64), limit)

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

    assert drafter.draft(np.array(text, dtype=np.int64), 10) == draft
