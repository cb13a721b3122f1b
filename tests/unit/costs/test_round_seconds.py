"""Prices of rounds by drafted tokens are the cost table's, read once."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.costs import CostTable, Measurement, RoundSeconds
from paceline.errors import ArtefactError


def table(forward: dict[int, list[float]], tokens: tuple[int, ...] = (1, 5, 9)) -> CostTable:
    """forward: rows -> seconds at 1, 5 and 9 tokens."""
    cells = [Measurement("target", "prefill", 16, 0, 1, 0.01)]
    for rows, seconds in forward.items():
        cells.append(Measurement("engine", "round", 0, 0, rows, 0.001 * rows))
        for n, value in zip(tokens, seconds, strict=True):
            cells += [Measurement("target", "forward", n, 0, rows, value)]
            cells += [Measurement("target", "forward", n, 1000, rows, 2 * value)]
    return CostTable({}, cells)


def test_a_round_costs_its_forward_and_the_engines_part() -> None:
    costs = table({1: [1.0, 2.0, 3.0], 4: [2.0, 4.0, 6.0]})

    seconds = RoundSeconds(costs).up_to(rows=4, context=70, num_drafted=5)

    expected = costs.seconds("target", "forward", 1 + np.arange(6), 64, 4) + 0.004
    assert seconds[:6] == pytest.approx(expected)


def test_a_disturbed_cell_leaves_prices_that_rise() -> None:
    seconds = RoundSeconds(table({1: [1.0, 1.0, 1.0], 2: [5.0, 1.0, 6.0]})).up_to(2, 0, 8)

    assert (np.diff(seconds) >= 0).all()
    forward = seconds - seconds[0]
    assert forward[4] == pytest.approx(0.0) and forward[8] == pytest.approx(3.0)


def test_the_table_is_read_once_and_again_for_longer_drafts() -> None:
    prices = RoundSeconds(table({1: [1.0, 2.0, 3.0], 2: [1.0, 2.0, 3.0]}))
    first = prices.up_to(2, 100, 4)

    assert prices.up_to(2, 101, 10) is first
    assert prices.up_to(3, 100, 10) is not first
    longer = prices.up_to(2, 100, 300)
    assert len(longer) > 300
    assert longer[: len(first)] == pytest.approx(first)


def test_a_table_of_one_row_says_what_to_do() -> None:
    with pytest.raises(ArtefactError, match=r"only forwards of one row .* `paceline profile`"):
        RoundSeconds(table({1: [1.0, 2.0, 3.0]}))
    with pytest.raises(ArtefactError, match="target, engine not measured"):
        RoundSeconds(CostTable({}, []))
