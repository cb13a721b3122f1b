"""Agreement of predicted and clocked seconds, on figures worked out by hand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

AGREEMENT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "agreement.py"))
Ranking, ranking = AGREEMENT["Ranking"], AGREEMENT["ranking"]
bias, median_error = AGREEMENT["bias"], AGREEMENT["median_error"]
median_bias = AGREEMENT["median_bias"]
PREDICTED = {"a": 1.0, "b": 1.04, "c": 1.2, "d": 2.0}


def test_only_separated_pairs_count() -> None:
    """a and b are too close; of the other five pairs, the clock reverses c and d."""
    clocked = {"a": 1.1, "b": 0.9, "c": 2.1, "d": 2.0}
    found = ranking(PREDICTED, clocked)
    assert found == Ranking(pairs=5, right=4)
    assert (found.share_right, found.tau) == (0.8, pytest.approx(0.6))
    assert ranking(PREDICTED, clocked, apart=0.0) == Ranking(6, 4)


def test_the_ends_of_the_scale() -> None:
    assert ranking(PREDICTED, PREDICTED).tau == 1.0
    assert ranking(PREDICTED, {name: -s for name, s in PREDICTED.items()}).tau == -1.0
    assert ranking(PREDICTED, dict.fromkeys(PREDICTED, 1.0)).right == 0
    assert ranking({"a": 1.0}, {"a": 3.0}).tau == 1.0
    assert Ranking(5, 4) + Ranking(3, 0) == Ranking(8, 4)


def test_errors_are_relative_to_the_clock() -> None:
    pairs = [(1.0, 2.0), (2.2, 2.0), (2.7, 3.0)]
    assert median_error(pairs) == pytest.approx(0.1)
    assert median_bias(pairs) == pytest.approx(-0.1)
    assert bias(pairs) == pytest.approx(5.9 / 7 - 1)
