"""The machine's drift between two cost tables of the same work, and prices of the time between them."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from paceline.costs import CostTable
from paceline.costs.table import FORWARD, TARGET

if TYPE_CHECKING:
    from paceline.costs import Measurement

    Cell = tuple[str, str, int, int, int]


def mean_of(before: CostTable, after: CostTable) -> CostTable:
    """Return the mean prices of two tables. A cell that only one of them has is left out."""
    later = {_cell_of(m): m.seconds for m in after.measurements}
    both = [m for m in before.measurements if _cell_of(m) in later]
    means = (replace(m, seconds=(m.seconds + later[_cell_of(m)]) / 2) for m in both)
    return CostTable(before.fingerprint, means)


def drift_between(before: CostTable, after: CostTable) -> float:
    """Return the median relative change of the target's forwards."""
    later = {_cell_of(m): m.seconds for m in after.measurements}
    forwards = [m for m in before.measurements if (m.subject, m.operation) == (TARGET, FORWARD)]
    return median(later[_cell_of(m)] / m.seconds - 1.0 for m in forwards)


def _cell_of(m: Measurement) -> Cell:
    return m.subject, m.operation, m.tokens, m.context, m.rows
