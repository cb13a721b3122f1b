"""The seconds that a cascade's rule divides by, from this machine's cost table.

Symbols: M models, W the longest draft, C buckets of contexts, R rows in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.costs.pricing import round_seconds
from paceline.costs.table import PROPOSE, START

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from paceline.costs.table import CostTable

BUCKET: Final = 128
"""Tokens of context that share a price."""

_NUM_BUCKETS: Final = 64
_READ: Final = (64, 256)  # prompts whose difference prices the reading of a token


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of a row's share of a round in which all R rows draft alike.

    verifying: [C, W + 1] of a round by drafted tokens, with the lookups and without a model. drafting:
    [C, M, W + 1] of a model's draft in addition. reading: [M] of each token that a model has not read.
    """

    verifying: NDArray[np.float64]
    drafting: NDArray[np.float64]
    reading: NDArray[np.float64]


def assumed_prices(num_models: int, longest: int) -> Prices:
    """Return prices in units of a round without a draft, for a machine that was not measured.

    A verified token is assumed to cost 4 % of it, a lookup 5 %, a model's draft 8 % and each of its
    tokens 6 %.
    """
    lengths = np.arange(longest + 1.0)
    drafting = np.where(lengths > 0, 0.08 + 0.06 * lengths, 0.0)
    return Prices(
        verifying=(1.05 + 0.04 * lengths)[None],
        drafting=np.tile(drafting, (1, num_models, 1)),
        reading=np.full(num_models, 0.005),
    )


def read_prices(
    costs: CostTable, cascade: str, models: Sequence[str], longest: int, rows: int = 1
) -> Prices:
    """Return the prices of a cost table with `rows` requests in flight.

    cascade: the arm whose proposal without a model is the price of its lookups.
    """
    contexts = (np.arange(_NUM_BUCKETS) * BUCKET + BUCKET // 2)[:, None]  # [C, 1]
    lengths = np.arange(longest + 1)[None]  # [1, W + 1]
    plain = round_seconds(costs.seconds, "none", lengths, contexts, rows, rows)
    lookups = np.asarray(costs.seconds(cascade, PROPOSE, np.zeros_like(lengths), contexts, rows))
    drafting = np.zeros((_NUM_BUCKETS, len(models), longest + 1))
    reading = np.zeros(len(models))
    for place, name in enumerate(models):
        seconds = np.asarray(costs.seconds(name, PROPOSE, lengths, contexts, rows)) / rows
        drafting[:, place] = np.where(lengths > 0, seconds, 0.0)
        few, many = (costs.seconds(name, START, n) for n in _READ)
        reading[place] = max(many - few, 0.0) / (_READ[1] - _READ[0])
    return Prices(np.ascontiguousarray(plain + lookups / rows), drafting, reading)
