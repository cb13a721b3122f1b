"""Features: their places, overlaps computed by hand, and no identification of a request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.contracts import Context, SamplingParams
from paceline.errors import RequestError
from paceline.selection.features import (
    STATISTICS,
    feature_vector,
    ngram_overlap,
    num_features,
)

D = 5


def context(tokens: list[int], **changes: object) -> Context:
    mean, last = np.arange(D, dtype=np.float32), -np.arange(D, dtype=np.float32)
    return replace(Context(tokens, mean, last, SamplingParams(), rows_in_flight=1), **changes)


def named(vector: np.ndarray) -> dict[str, float]:
    hidden = [f"{part}_hidden_{i}" for part in ("mean", "last") for i in range(D)]
    return dict(zip([*hidden, *STATISTICS], vector.tolist(), strict=True))


def overlap_one_by_one(tokens: list[int], n: int) -> float:
    """Count repeated n-grams by walking the text, as a readable reference."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    seen: set[tuple[int, ...]] = set()
    repeats = 0
    for gram in grams:
        repeats += gram in seen
        seen.add(gram)
    return repeats / len(grams) if grams else 0.0


def test_every_feature_has_its_name_and_place() -> None:
    found = named(feature_vector(context([7, 8, 7, 8, 7, 8], rows_in_flight=4)))

    assert len(found) == num_features(D) == 2 * D + len(STATISTICS)
    assert [found[f"mean_hidden_{i}"] for i in range(D)] == [0, 1, 2, 3, 4]
    assert [found[f"last_hidden_{i}"] for i in range(D)] == [0, -1, -2, -3, -4]
    assert found["log_prompt_tokens"] == pytest.approx(np.log(6))
    assert found["bigram_overlap"] == pytest.approx(3 / 5)  # 78 87 78 87 78
    assert found["trigram_overlap"] == pytest.approx(2 / 4)  # 787 878 787 878
    assert found["repeated_tokens"] == pytest.approx(4 / 6)
    assert found["temperature"] == 0.0
    assert found["log_rows_in_flight"] == pytest.approx(np.log(4))


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([3], 1, 0.0),
        ([3, 3], 1, 0.5),
        ([3, 3], 2, 0.0),
        ([3, 3, 3], 2, 0.5),
        ([1, 2, 3, 4, 5], 2, 0.0),
        ([1, 2, 3, 1, 2, 3], 3, 0.25),
        ([1, 2, 2, 1], 2, 0.0),  # 12 and 21 are not the same
        ([262143, 1, 5, 262143, 1], 2, 0.25),
    ],
)
def test_overlap_of_hand_made_texts(tokens: list[int], n: int, expected: float) -> None:
    assert ngram_overlap(np.array(tokens), n) == pytest.approx(expected)


@given(st.lists(st.integers(0, 5) | st.integers(0, 300_000), max_size=60), st.integers(1, 3))
def test_overlap_is_that_of_walking_the_text(tokens: list[int], n: int) -> None:
    found = ngram_overlap(np.array(tokens, dtype=np.int64), n)

    assert found == pytest.approx(overlap_one_by_one(tokens, n))


@pytest.mark.parametrize(
    "changes",
    [{"request_id": "another"}, {"sampling": SamplingParams(seed=99)}],
    ids=["request id", "seed"],
)
def test_what_identifies_a_request_is_no_feature(changes: dict[str, object]) -> None:
    tokens = [1, 2, 3, 2, 3]
    before, after = feature_vector(context(tokens)), feature_vector(context(tokens, **changes))

    assert np.array_equal(before, after)


def test_token_ids_count_only_as_equal_or_not() -> None:
    """Renaming every token leaves the statistics as they are: no feature is an id."""
    tokens = [1, 2, 3, 2, 3, 9]
    renamed = [t * 1000 + 17 for t in tokens]

    assert np.array_equal(feature_vector(context(tokens)), feature_vector(context(renamed)))


def test_temperature_and_load_are_features() -> None:
    plain = feature_vector(context([1, 2]))
    warm = feature_vector(context([1, 2], sampling=SamplingParams(temperature=0.7)))
    busy = feature_vector(context([1, 2], rows_in_flight=8))

    assert named(warm)["temperature"] == pytest.approx(0.7)
    assert np.flatnonzero(plain != warm).tolist() == [2 * D + STATISTICS.index("temperature")]
    assert np.flatnonzero(plain != busy).tolist() == [
        2 * D + STATISTICS.index("log_rows_in_flight")
    ]


def test_a_vector_is_float32_and_finite_for_any_prompt_length() -> None:
    for length in (1, 2, 3, 400):
        vector = feature_vector(context(list(range(length))))
        assert vector.dtype == np.float32
        assert np.isfinite(vector).all()


def test_no_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        feature_vector(context([]))
