"""The seconds that a cascade's rule divides by are those of the cost table."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.costs import CostTable, Measurement
from paceline.costs.pricing import round_seconds
from paceline.drafting.cascade import entry
from paceline.drafting.cascade.prices import BUCKET, assumed_prices, read_prices
from paceline.errors import ArtefactError

LONGEST = 6


def costs() -> CostTable:
    """Return seconds that differ in all arguments, over more contexts than one bucket has."""
    cells = [Measurement("engine", "round", 0, 0, n, 0.1 * n) for n in (1, 8)]
    for n in (1, 8):
        for context in (0, 300, 900):
            cells += [
                Measurement("target", "forward", t, context, n, 1 + 0.07 * t + 0.003 * context * n)
                for t in (1, 4, 60)
            ]
            cells += [
                Measurement(name, "propose", t, context, n, n * (0.02 + each * t + 0.001 * context))
                for name, each in (("both", 0.0), ("near", 0.2), ("far", 0.4))
                for t in (0, 2, 6)
            ]
    for length in (1, 512):
        cells.append(Measurement("target", "prefill", length, 0, 1, 2.0 + 0.1 * length))
        cells += [
            Measurement(name, "start", length, 0, 1, 0.2 + each * length)
            for name, each in (("both", 0.05), ("near", 0.01), ("far", 0.03))
        ]
    return CostTable({}, cells)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("context", [0, 63, BUCKET, 5 * BUCKET + 1, 10**6])
def test_a_price_is_a_rows_share_at_the_middle_of_its_bucket(rows: int, context: int) -> None:
    table = costs()
    prices = read_prices(table, "both", ["near", "far"], LONGEST, rows)

    # a row's tokens are one more than those that are cached
    bucket = entry._bucket_of(context + 1, len(prices.verifying))
    assert bucket == min(context // BUCKET, len(prices.verifying) - 1)
    verifying, drafting = prices.verifying[bucket], prices.drafting[bucket]
    middle = bucket * BUCKET + BUCKET // 2
    for n in range(LONGEST + 1):
        forward = table.seconds("target", "forward", 1 + n * rows, middle, rows)
        engine = table.seconds("engine", "round", 0, 0, rows)
        lookups = table.seconds("both", "propose", 0, middle, rows)
        assert verifying[n] == pytest.approx((forward + engine + lookups) / rows)
        for model, name in enumerate(("near", "far")):
            own = table.seconds(name, "propose", n, middle, rows) / rows if n else 0.0
            assert drafting[model, n] == pytest.approx(own)


def test_prices_are_those_of_the_round_that_the_reward_pays() -> None:
    """The rule, and the seconds by which a policy is judged, agree on what a round costs."""
    table, n, middle = costs(), np.array([3]), np.array([BUCKET // 2])
    prices = read_prices(table, "both", ["near"], LONGEST, 8)

    plain = round_seconds(table.seconds, "both", n, middle, 8, 8, proposed=np.array([0]))

    assert prices.verifying[0, 3] == pytest.approx(plain[0])


def test_prices_rise_with_the_bucket_and_depend_on_the_rows() -> None:
    one, eight = (read_prices(costs(), "both", ["near"], LONGEST, rows) for rows in (1, 8))

    assert (np.diff(one.verifying, axis=0) > 0).all()
    assert (np.diff(one.drafting[:, :, 1:], axis=0) > 0).all()
    assert not np.allclose(one.verifying, eight.verifying)


def test_reading_costs_what_a_longer_start_costs() -> None:
    prices = read_prices(costs(), "both", ["near", "far"], LONGEST)

    assert prices.reading == pytest.approx([0.01, 0.03])


def test_reading_never_earns_seconds() -> None:
    cells = [m for m in costs().measurements if (m.subject, m.operation) != ("near", "start")]
    cells += [
        Measurement("near", "start", n, 0, 1, seconds) for n, seconds in ((1, 0.3), (512, 0.1))
    ]

    assert read_prices(CostTable({}, cells), "both", ["near"], LONGEST).reading.tolist() == [0.0]


@pytest.mark.parametrize("subject", ["both", "near"])
def test_a_part_that_was_not_measured_is_named(subject: str) -> None:
    cells = [m for m in costs().measurements if m.subject != subject]

    with pytest.raises(ArtefactError, match=f"'{subject}'"):
        read_prices(CostTable({}, cells), "both", ["near"], LONGEST)


@pytest.mark.parametrize("num_models", [0, 1, 3])
def test_assumed_prices_rise_with_the_tokens(num_models: int) -> None:
    prices = assumed_prices(num_models, 16)

    verifying, drafting = prices.verifying[0], prices.drafting[0]
    assert verifying.shape == (17,) and drafting.shape == (num_models, 17)
    assert (verifying >= 1.0).all() and (np.diff(verifying) > 0).all()
    assert (drafting[:, 0] == 0).all() and (np.diff(drafting) > 0).all()
    assert prices.reading.shape == (num_models,) and (prices.reading > 0).all()
