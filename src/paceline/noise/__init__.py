"""Random numbers as a function of (seed, position, stream), equal on every device.

A counter-based generator (splitmix64) instead of a stateful one: the number at a position does not
depend on the drafter, on the batch, or on how often a round was repeated. Each use of a number has its
own stream, so that a draft, its acceptance and its replacement are independent.
Knows nothing of models or distributions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", "Tensor", int)

TARGET: Final = 1  # the draw that becomes the text
DRAFT: Final = 2  # a drafter's own draw, under residual sampling
ACCEPT: Final = 3  # the accept test of residual sampling

_GOLDEN: Final = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1: Final = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2: Final = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; int64's own shift fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _bits(seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    # Python integers do not wrap, so the stream's offset is wrapped by hand; tensors wrap
    offset = (_GOLDEN * stream + 2**63) % 2**64 - 2**63
    return _mix(_mix(seeds + offset) + _GOLDEN * (positions + 1))


def of_round(positions: T, start: int) -> T:
    """Return positions that give other numbers in every round. start: tokens of the row before it.

    For drafts that must not be drawn again after a rejection, and for judges whose verdict depends on
    all uniforms of a round, also on those after the accepted tokens.
    """
    return positions + (start << 32)


def uniform(seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """Return uniform draws in [0, 1), float64, in the shape of `seeds` and `positions` broadcast."""
    return _shift(_bits(seeds, positions, stream), 11).to(torch.float64) * 2.0**-53


def exponential(seeds: Tensor, positions: Tensor, stream: int, num_tokens: int) -> Tensor:
    """Return standard exponential noise [..., num_tokens] float32, for the race argmax(p / e).

    The winner of the race is distributed as p (the Gumbel-argmax trick in the linear domain). Only
    small values can win, so they keep their full relative precision: -log1p(-u) with u near 0.
    """
    tokens = torch.arange(1, num_tokens + 1, device=seeds.device)
    bits = _mix(_bits(seeds, positions, stream)[..., None] + _GOLDEN * tokens)
    u = (_shift(bits, 11).to(torch.float32) + 0.5) * 2.0**-53
    # float32 rounds the largest integers up to 1.0, whose logarithm would be infinite
    return -torch.log1p(-u.clamp_(max=1.0 - 2.0**-24))


def race(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw a token id [...] from each distribution [..., V] with noise [..., V].

    -1 if no token is possible or a probability is nan.
    """
    best, winners = (probs / noise).max(dim=-1)
    return torch.where(best > 0.0, winners, -1)


def draw(probs: Tensor, seed: int, position: int, stream: int) -> int:
    """Draw a token from a distribution [V] float32 at a seed and position; -1 if none is possible.

    The CPU uses the compiled race, since the noise of a whole vocabulary takes longer than the forward
    of a small model. Other devices use `race`. The two differ only if two tokens tie to the last bit.
    """
    if probs.device.type != "cpu":
        at = torch.tensor([seed, position], device=probs.device)
        return int(race(probs, exponential(at[0], at[1], stream, probs.shape[-1])))
    from paceline.noise.kernels import race as compiled_race

    unsigned = (np.uint64(number % 2**64) for number in (seed, position, stream))
    return int(compiled_race(probs.numpy(), *unsigned))
