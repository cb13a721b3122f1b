"""The next drafted token of each row, from a model's logits: argmax, or a draw from warped q.

Randomness is keyed by the row's seed and the position: the judge's own noise under `invariant`
sampling, the drafter's own stream where the judge reads q. This module knows no model and no drafter.
Symbols: R rows, K draft length, V the target's logits width, V' the drafter's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

import paceline.noise as noise
from paceline.models.packing import Draw
from paceline.models.scores import most_likely
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView

# methods whose judge reads the drafter's distribution; under the others both draw with the same noise
STOCHASTIC: Final = ("residual", "block")


def empty_probs(
    rows: Sequence[RowView], width: int, num_logits: int, device: torch.device
) -> Tensor | None:
    """Return zeros [R, K, V] for `draw` to fill, or None if no row's judge reads q."""
    if not any(row.sampling.method in STOCHASTIC for row in rows):
        return None
    return torch.zeros((len(rows), width, num_logits), device=device)


def draw(
    rows: Sequence[RowView],
    logits: Tensor,
    step: int,
    probs: Tensor | None,
    places: Sequence[int],
) -> list[int]:
    """Return token `step` of each row's draft [R]. logits: [R, V'].

    q of row r goes to probs[places[r], step] if its judge reads it. A distribution without a possible
    token drafts token 0, which only costs speed.
    """
    if all(row.sampling.method == "greedy" for row in rows):
        return _argmax(logits)
    drawn: list[int] = []
    for r, row in enumerate(rows):
        if row.sampling.method == "greedy":
            drawn += _argmax(logits[r : r + 1])
            continue
        q = warp(logits[r], row.sampling)
        stochastic = row.sampling.method in STOCHASTIC
        stream = noise.DRAFT if stochastic else noise.TARGET
        position = len(row.tokens) + step
        if stochastic:
            # the next round's draft at this position needs fresh noise: an adaptive stop may depend on
            # this round's
            position = noise.of_round(position, len(row.tokens))
        drawn.append(max(noise.draw(q, row.sampling.seed, position, stream), 0))
        if stochastic and probs is not None:
            probs[places[r], step, : q.shape[-1]] = q
    return drawn


def _argmax(logits: Tensor) -> list[int]:
    return [max(token, 0) for token in most_likely(logits)]


def draw_along(q: Tensor, seed: int, start: int) -> Tensor:
    """Return the tokens [T] that `invariant` sampling draws from q [T, V'] at positions from `start`."""
    drawn = [noise.draw(row, seed, start + i, noise.TARGET) for i, row in enumerate(q)]
    return torch.tensor(drawn, dtype=torch.int64)


def is_chain_drawn(row: RowView) -> bool:
    """Return whether a model may draw the row's draft without the host: no logit is left out first."""
    s = row.sampling
    whole = s.top_k == 0 and s.top_p >= 1.0 and s.min_p == 0.0
    return s.method == "greedy" or (s.method == "invariant" and whole)


def draws_of(rows: Sequence[RowView]) -> list[Draw | None] | None:
    """Return the draws of the rows' next tokens; None if all rows are greedy."""
    draws = [
        None
        if row.sampling.method == "greedy"
        else Draw(row.sampling.seed, len(row.tokens), row.sampling.temperature)
        for row in rows
    ]
    return draws if any(draw is not None for draw in draws) else None
