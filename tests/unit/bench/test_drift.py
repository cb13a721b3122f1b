"""Prices between two profiles are their means, and the drift is that of the target's forwards."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from paceline.costs import CostTable, Measurement

DRIFT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "drift.py"))
mean_of, drift_between = DRIFT["mean_of"], DRIFT["drift_between"]


def table(*forwards: float, drafts: tuple[int, ...] = ()) -> CostTable:
    """forwards: seconds of 1, 2, ... tokens. drafts: lengths of drafts of 1 second."""
    cells = [Measurement("target", "forward", 1 + n, 32, 1, s) for n, s in enumerate(forwards)]
    cells += [Measurement("lookup", "propose", k, 32, 1, 1.0) for k in drafts]
    return CostTable({"cpu": "some"}, cells)


def test_prices_are_the_means_of_both_tables() -> None:
    mean = mean_of(table(1.0, 2.0), table(3.0, 2.0))

    assert [m.seconds for m in mean.measurements] == [2.0, 2.0]
    assert mean.fingerprint == {"cpu": "some"}


def test_a_cell_of_one_table_is_left_out() -> None:
    mean = mean_of(table(1.0, drafts=(1, 2)), table(1.0, drafts=(2, 3)))

    assert mean.grid("lookup", "propose") == ([2], [32])


def test_drift_is_the_median_change_of_forwards() -> None:
    before, after = table(1.0, 2.0, 4.0, drafts=(1,)), table(1.1, 2.4, 8.0, drafts=(1,))

    assert drift_between(before, after) == pytest.approx(0.2)
    assert drift_between(before, before) == 0.0
