"""The next drafted token of each row, from a model's logits: argmax, or a draw from warped q.

Randomness is keyed by the row's seed and the position: the judge's own noise under `invariant`
sampling, a stream of the drafter's where the judge weighs q. Knows no model and no drafter.
Symbols: R rows, K draft length, V the target's logits width, V' the drafter's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

import paceline.noise as noise
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView

# methods whose judge weighs the drafter's distribution; for the others its noise is the judge's
_STOCHASTIC: Final = ("residual", "block")


def empty_probs(
    rows: Sequence[RowView], width: int, num_logits: int, device: torch.device
) -> Tensor | None:
    """[R, K, V] zeros to be filled by `draw`, or None if no row's judge wants to know q."""
    if not any(row.sampling.method in _STOCHASTIC for row in rows):
        return None
    return torch.zeros((len(rows), width, num_logits), device=device)


def draw(
    rows: Sequence[RowView],
    logits: Tensor,
    step: int,
    probs: Tensor | None,
    places: Sequence[int],
) -> Tensor:
    """Token `step` of each row's draft [R]. logits: [R, V'].

    q of row r goes to probs[places[r], step] where its judge weighs it.
    """
    if all(row.sampling.method == "greedy" for row in rows):
        return logits.argmax(dim=-1).cpu()
    drawn = torch.empty(len(rows), dtype=torch.int64)
    for r, row in enumerate(rows):
        if row.sampling.method == "greedy":
            drawn[r] = logits[r].argmax()
            continue
        q = warp(logits[r], row.sampling)
        stochastic = row.sampling.method in _STOCHASTIC
        stream = noise.DRAFT if stochastic else noise.TARGET
        position = len(row.tokens) + step
        if stochastic:
            # a draft behind a rejection may have moved an adaptive stop: it must not be drawn again
            position = noise.of_round(position, len(row.tokens))
        # a drafter without a possible token drafts token 0: only speed depends on it
        drawn[r] = max(noise.draw(q, row.sampling.seed, position, stream), 0)
        if stochastic and probs is not None:
            probs[places[r], step, : q.shape[-1]] = q
    return drawn


def draw_along(q: Tensor, seed: int, start: int) -> Tensor:
    """[T] the token that `invariant` sampling draws from each q [T, V'] at positions from `start`."""
    drawn = [noise.draw(row, seed, start + i, noise.TARGET) for i, row in enumerate(q)]
    return torch.tensor(drawn, dtype=torch.int64)
