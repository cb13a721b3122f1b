"""Judges that also draw the token behind what they keep, from noise they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from paceline.noise import race
from paceline.verification import accept_block, accept_residual

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.verification import AcceptedPrefixes


class Judged(NamedTuple):
    num_accepted: Tensor  # [R]
    next_tokens: Tensor  # [R]


def judge_residual(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, accept_u: Tensor, noise: Tensor
) -> Judged:
    """As the engine does with `accept_residual`. noise: [R, K+1, V] exponentials."""
    return _drawn(accept_residual(p, q, tokens, lengths, accept_u), noise)


def judge_block(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, accept_u: Tensor, noise: Tensor
) -> Judged:
    """As the engine does with `accept_block`. noise: [R, K+1, V] exponentials."""
    return _drawn(accept_block(p, q, tokens, lengths, accept_u), noise)


def _drawn(accepted: AcceptedPrefixes, noise: Tensor) -> Judged:
    rows = torch.arange(len(noise), device=noise.device)
    drawn = race(accepted.next_weights, noise[rows, accepted.num_accepted])
    return Judged(accepted.num_accepted, drawn)
