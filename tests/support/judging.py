"""Judges that also draw the token after the accepted ones, from given noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from paceline.noise import race
from paceline.verification import accept_block, accept_residual

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.verification import AcceptedPrefixes


class JudgedDrafts(NamedTuple):
    """The verdicts on R drafts, with each row's next token."""

    num_accepted: Tensor  # [R]
    next_tokens: Tensor  # [R]


def judge_residual(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, accept_u: Tensor, noise: Tensor
) -> JudgedDrafts:
    """Judge and draw as the engine does with `accept_residual`. noise: [R, K+1, V] exponentials."""
    return _draw(accept_residual(p, q, tokens, lengths, accept_u), noise)


def judge_block(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, accept_u: Tensor, noise: Tensor
) -> JudgedDrafts:
    """Judge and draw as the engine does with `accept_block`. noise: [R, K+1, V] exponentials."""
    return _draw(accept_block(p, q, tokens, lengths, accept_u), noise)


def _draw(accepted: AcceptedPrefixes, noise: Tensor) -> JudgedDrafts:
    rows = torch.arange(len(noise), device=noise.device)
    drawn = race(accepted.next_weights, noise[rows, accepted.num_accepted])
    return JudgedDrafts(accepted.num_accepted, drawn)
