"""Prices while decoding equal those of `costs.pricing`, by context bucket, rows and objective."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.contracts import NONE
from paceline.costs.table import (
    ENGINE,
    FORWARD,
    PROPOSE,
    ROUND,
    START,
    TARGET,
    CostTable,
    Measurement,
)
from paceline.selection import TablePrices


def table() -> CostTable:
    cells = []
    for rows in (1, 4):
        cells.append(Measurement(ENGINE, ROUND, 0, 0, rows, 0.1))
        for context in (0, 1000):
            for tokens in (1, 1 + 4 * rows):
                seconds = 1.0 + 0.05 * (rows - 1 + tokens) + 0.001 * context * rows
                cells.append(Measurement(TARGET, FORWARD, tokens, context, rows, seconds))
        for drafted in (0, 4):
            seconds = (0.01 + 0.2 * drafted) * rows**0.5
            cells.append(Measurement("a", PROPOSE, drafted, 0, rows, seconds))
    cells += [Measurement("a", START, n, 0, 1, 0.01 * n) for n in (1, 1000)]
    return CostTable({}, cells)


def test_a_round_is_forward_draft_and_host() -> None:
    prices = TablePrices(table(), {"a": 4})
    rounds = prices.rounds("a", 70, 1)

    middle = 64 + 32
    expected = [1.0 + 0.05 * (1 + k) + 0.001 * middle + (0.01 + 0.2 * k) + 0.1 for k in range(5)]
    np.testing.assert_allclose(rounds, expected)
    plain = prices.rounds(NONE, 70, 1)
    np.testing.assert_allclose(plain, [1.0 + 0.05 + 0.001 * middle + 0.1])
    assert prices.rounds("a", 64, 1) is rounds
    assert prices.rounds("a", 128, 1) is not rounds


def test_drafts_and_reading_are_priced_alone() -> None:
    prices = TablePrices(table(), {"a": 4})

    assert prices.drafting("a", 4, 10) == pytest.approx(0.81)
    assert prices.drafting(NONE, 0, 10) == 0.0
    assert prices.catching_up("a", 500) == pytest.approx(5.0, abs=0.1)
    assert prices.catching_up("a", 0) == prices.catching_up(NONE, 50) == 0.0


def test_objectives_agree_alone_and_order_the_price_of_drafts_among_rows() -> None:
    """Over plain decoding, drafts of all rows cost the machine more than the draft of one."""
    by_weight = [TablePrices(table(), {"a": 4}, weight) for weight in (0.0, 0.5, 1.0)]
    alone = [prices.rounds("a", 0, 1) for prices in by_weight]
    np.testing.assert_allclose(alone[0], alone[1])
    np.testing.assert_allclose(alone[0], alone[2])

    relative = [p.rounds("a", 0, 4)[4] / p.rounds(NONE, 0, 4)[0] for p in by_weight]
    assert relative[0] < relative[1] < relative[2]
    assert relative[1] == pytest.approx((relative[0] * relative[2]) ** 0.5)


def test_one_row_among_four_drafts_or_all_of_them_do() -> None:
    latency, throughput = (TablePrices(table(), {"a": 4}, o) for o in ("latency", "throughput"))
    middle = 4 * 0.001 * 32

    one = 1.0 + 0.05 * (3 + 1 + 4) + middle + 0.81 + 0.1
    assert latency.rounds("a", 0, 4)[4] == pytest.approx(one)
    together = 1.0 + 0.05 * (3 + 1 + 16) + middle + 2 * 0.81 + 0.1
    assert throughput.rounds("a", 0, 4)[4] == pytest.approx(together / 4)
    plain = 1.0 + 0.05 * 4 + middle + 0.1
    assert latency.rounds(NONE, 0, 4)[0] == pytest.approx(plain)
    assert throughput.rounds(NONE, 0, 4)[0] == pytest.approx(plain / 4)
