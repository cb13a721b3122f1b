"""Losses between the target's and a student's next-token distribution, with their gradients.

A loss is a function of p (target) and q (student) on B buckets: all V tokens of the vocabulary, or k
tokens and one bucket of all others. It returns the values and the slopes w = q * dL/dq, from which

    dL/dlogit_j = w_j - q_j * sum(w)

follows through the softmax. The tokens of a bucket share its slope in proportion to q, since a loss
depends on their sum alone. On fewer buckets a divergence is a lower bound of the full one and the
acceptance an upper bound (data processing inequality). Knows no model. Symbols: m positions.

Sources: TVD++ arXiv 2403.00858; negative log acceptance and the LK hybrid arXiv 2602.23881.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from paceline.distillation.settings import LossName

    Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_TINY: Final = 1e-30  # smallest argument of a logarithm
_ETA: Final = 3.0  # of the LK hybrid, as published


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """Return the probability [m] that a token drawn from q is accepted: sum_x min(p, q) = 1 - TVD."""
    return torch.minimum(p, q).sum(dim=-1)


def kl(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) [m] and its slopes [m, B]. For one-hot p it is the cross-entropy."""
    values = (p * (_log(p) - _log(q))).sum(dim=-1)
    return values, -p


def reverse_kl(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) [m] and its slopes [m, B]."""
    terms = q * (_log(q) - _log(p))
    # the derivative's constant 1 cancels in the softmax
    return terms.sum(dim=-1), terms


def jensen_shannon(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return (KL(p || a) + KL(q || a)) / 2 [m], where a = (p + q) / 2, and its slopes [m, B]."""
    log_average = _log((p + q) / 2)
    terms = 0.5 * q * (_log(q) - log_average)
    values = (0.5 * p * (_log(p) - log_average) + terms).sum(dim=-1)
    return values, terms


def tvd(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the total variation distance 1 - sum min(p, q) [m] and its slopes [m, B].

    The slopes are -q * r with the rewards r = 1[p > q] of arXiv 2403.00858.
    """
    return 1 - acceptance(p, q), -q * rewards(p, q)


def tvd_plus_plus_of_position(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the TVD [m] and its slopes [m, B] with the rewards of each position standardised.

    Mean and deviation are taken under q over the vocabulary of one position.
    """
    r = rewards(p, q)
    mean = (q * r).sum(dim=-1, keepdim=True)
    # a mean of 0 or 1 has no gradient; the floor limits the factor 1 / deviation
    deviation = (mean * (1 - mean)).clamp(min=1e-4).sqrt()
    return 1 - acceptance(p, q), -q * (r - mean) / deviation


def negative_log_acceptance(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log sum min(p, q) [m] and its slopes [m, B]. For one-hot p it is the cross-entropy."""
    accepted = acceptance(p, q).clamp(min=_TINY)
    return -accepted.log(), -q * rewards(p, q) / accepted[:, None]


def lk_hybrid(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return lambda KL + (1 - lambda) TVD [m] and its slopes [m, B].

    lambda = exp(-3 alpha) depends on each position's acceptance alpha and is held constant in the
    gradient.
    """
    share = torch.exp(-_ETA * acceptance(p, q))
    kl_values, kl_slopes = kl(p, q)
    tvd_values, tvd_slopes = tvd(p, q)
    values = share * kl_values + (1 - share) * tvd_values
    return values, share[:, None] * kl_slopes + (1 - share[:, None]) * tvd_slopes


def rewards(p: Tensor, q: Tensor) -> Tensor:
    """Return r = 1[p > q] [m, B] as numbers: 1 where more of a token raises the acceptance."""
    return (p > q).to(q.dtype)


LOSSES: Final[Mapping[LossName, Loss]] = MappingProxyType(
    {
        "cross_entropy": kl,  # with the token of the target's text as one-hot p
        "kl": kl,
        "reverse_kl": reverse_kl,
        "jensen_shannon": jensen_shannon,
        "tvd": tvd,
        "tvd++": tvd,  # standardised over the batch by `objective`, which sees all of it
        "tvd++_position": tvd_plus_plus_of_position,
        "negative_log_acceptance": negative_log_acceptance,
        "lk_hybrid": lk_hybrid,
    }
)


def sampled_tvd_slopes(
    p: Tensor, q: Tensor, num_samples: int, generator: torch.Generator, standardised: bool
) -> Tensor:
    """Return slopes [m, B] of the TVD from tokens that are drawn from q, as in arXiv 2403.00858.

    standardised: TVD++, whose rewards have mean 0 and deviation 1 over all samples of all positions.
    The expectation is that of `tvd`, divided by the deviation for TVD++.
    """
    drawn = torch.multinomial(q, num_samples, replacement=True, generator=generator)  # [m, samples]
    advantage = rewards(p, q).gather(1, drawn)
    if standardised:
        deviation = advantage.std(correction=0).clamp(min=1e-4)
        advantage = (advantage - advantage.mean()) / deviation
    return torch.zeros_like(q).scatter_add_(1, drawn, -advantage / num_samples)


def _log(values: Tensor) -> Tensor:
    return values.clamp(min=_TINY).log()
