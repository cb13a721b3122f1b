"""Costs of a target that drafts for itself: measured once, linear in the sub-layers that it keeps.

The cost table has the target's verifying forward by width, the engine's seconds per round and, under
the subject "draft", the seconds of one drafted token: a base, one attention and one MLP. Searches
with the same table see the same prices on any machine.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from paceline.bench.cost_measurement import (
    SKIPPING,
    plain_driver,
    time_forwards,
    time_rounds,
    time_skipping,
)
from paceline.bench.measured_rows import cached_rows
from paceline.bench.profile import fingerprint, measure_cells
from paceline.contracts import NONE
from paceline.costs.pricing import round_seconds
from paceline.costs.table import PROPOSE, CostTable, Measurement
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from paceline.assembly import Parts

DRAFT: Final = "draft"
_REPEATS: Final = 15
_CONTEXT: Final = 128
_WIDTHS: Final = (1, 2, 3, 5, 9)
_NOWHERE: Final = np.array(0)  # context; the table has one, so its prices do not depend on it


class SubsetPricer:
    """Seconds per token when the target drafts without a subset of its sub-layers.

    Raises ArtefactError if the table lacks a price.
    """

    def __init__(self, table: CostTable, num_layers: int) -> None:
        self._table = table
        self._num_layers = num_layers
        self._base, self._attention, self._mlp = (
            table.seconds(DRAFT, part, 1) for part in ("base", "attention", "mlp")
        )
        self.plain = float(round_seconds(table.seconds, NONE, np.array(0), _NOWHERE))
        """Seconds per token of the target alone."""

    def draft_token(self, subset: LayerSubset) -> float:
        """Return the seconds of one drafted token without the subset."""
        attentions = self._num_layers - len(subset.attention)
        mlps = self._num_layers - len(subset.mlp)
        return self._base + attentions * self._attention + mlps * self._mlp

    def seconds_per_token(self, rounds: Sequence[np.ndarray], subset: LayerSubset) -> float:
        """Return the seconds per emitted token of rounds [n, 2], drafted and accepted, not prefill."""
        per_drafted = self.draft_token(subset)

        def seconds(
            subject: str, operation: str, tokens: NDArray[Any], context: NDArray[Any], rows: int
        ) -> ArrayLike:
            if operation == PROPOSE:
                return tokens * per_drafted
            return self._table.seconds(subject, operation, tokens, context, rows)

        drafted, accepted = np.concatenate(rounds).T
        spent = round_seconds(seconds, DRAFT, drafted, _NOWHERE)
        return float(spent.sum() / (accepted + 1).sum())


def measure_costs(
    parts: Parts, num_draft_tokens: int, on_run: Callable[[int, int], None]
) -> CostTable:
    """Measure what `SubsetPricer` reads. on_run(done, total) counts runs of workloads."""
    num_layers = parts.target.num_layers
    every = frozenset(range(num_layers))
    subsets = {
        "all": LayerSubset(),
        "no attention": LayerSubset(attention=every),
        "no mlp": LayerSubset(mlp=every),
        "nothing": LayerSubset.everything(num_layers),
    }
    widths = sorted({*_WIDTHS, 1 + num_draft_tokens})
    context = max(1, min(_CONTEXT, parts.target.context_length - max(widths) - 1))
    driver = plain_driver(parts, max_rows=1)
    with torch.inference_mode(), cached_rows(parts, [context]) as rows:
        workloads = [
            partial(time_forwards, parts, rows, context, [[width - 1] for width in widths]),
            partial(time_skipping, parts, rows[0], context, subsets),
            partial(time_rounds, parts, driver, NONE, 1),
        ]
        cells = measure_cells(workloads, on_run, fewest=_REPEATS)
    without = {name: cells.pop((SKIPPING, name, 1, context, 1)) for name in subsets}
    measured = [Measurement(*cell, seconds=seconds) for cell, seconds in cells.items()]
    # each share twice: what leaving the kind out of the whole saves, and what it adds on its own
    whole, alone = without["all"], without["nothing"]
    attention = (whole - without["no attention"] + without["no mlp"] - alone) / 2
    mlp = (whole - without["no mlp"] + without["no attention"] - alone) / 2
    shares = {"base": alone, "attention": attention / num_layers, "mlp": mlp / num_layers}
    for part, seconds in shares.items():
        measured.append(Measurement(DRAFT, part, 1, 0, 1, max(0.0, seconds)))
    return CostTable(fingerprint(parts), measured)
