"""Acceptance of stochastic drafts, for R chains at once.

p = target's, q = drafter's distribution after the same warping; K = draft length; V = vocabulary.
`accept_residual` is speculative sampling (arXiv 2211.17192, algorithm 1): accept with min(1, p/q),
else draw from the normalised max(0, p - q). `accept_block` accepts the tokens of a chain jointly
(arXiv 2403.10444, algorithm 2) and accepts no fewer of them on average. A residual is already a
distribution and is never warped again. A draft token outside the vocabulary counts as rejected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class AcceptedPrefixes(NamedTuple):
    """The accepted prefixes of R chains, and the distributions of the tokens after them."""

    num_accepted: Tensor  # [R] int64
    next_weights: Tensor  # [R, V] weights, not normalised, of the recovered or the bonus token


def accept_residual(
    p: Tensor, q: Tensor, draft_tokens: Tensor, lengths: Tensor, accept_u: Tensor
) -> AcceptedPrefixes:
    """Accept the tokens of stochastic drafts one by one.

    p: [R, K+1, V]. q: [R, K, V], each draft token's own distribution. draft_tokens: [R, K].
    lengths: [R]. accept_u: [R, K] uniforms.
    """
    p_draft, q_draft, usable = _at_drafts(p, q, draft_tokens, lengths)
    # u < p/q without dividing: q may underflow to 0 at a token that was nevertheless drawn
    is_accepted = (accept_u * q_draft < p_draft) & usable
    num_accepted = is_accepted.to(torch.int64).cumprod(dim=-1).sum(dim=-1)
    return _recover(p, q, p.new_ones(len(p)), num_accepted, lengths)


def accept_block(
    p: Tensor, q: Tensor, draft_tokens: Tensor, lengths: Tensor, accept_u: Tensor
) -> AcceptedPrefixes:
    """Accept stochastic drafts by block verification; arguments as in `accept_residual`.

    b_i = min(1, b_{i-1} p/q) is the share of the first i tokens' weight that p can carry, b_0 = 1. The
    longest prefix i with u_i < h_i is accepted: h_i = R_i / (R_i + 1 - b_i), where R_i is the mass of
    max(0, b_i p - q) at the next place, and h_K = b_K. The accepted length depends on all drafts and
    uniforms of a round, so the next round must not draw any of them again with the same noise.
    """
    num_rows, num_drafted = draft_tokens.shape
    p_draft, q_draft, usable = _at_drafts(p, q, draft_tokens, lengths)
    num_accepted = torch.zeros(num_rows, dtype=torch.int64, device=p.device)
    carried = p.new_ones(num_rows)
    shares = [carried]
    for i in range(num_drafted):
        scaled = carried * p_draft[:, i]
        # min(1, scaled / q) without dividing by a q that underflowed
        carried = torch.where(scaled < q_draft[:, i], scaled / q_draft[:, i], (scaled > 0).to(p))
        carried = torch.where(usable[:, i], carried, 0.0)
        shares.append(carried)
        threshold = carried
        if i + 1 < num_drafted:
            residual = (carried[:, None] * p[:, i + 1] - q[:, i + 1]).clamp(min=0.0).sum(dim=-1)
            total = residual + 1.0 - carried
            # p == q to the last bit leaves no residual: the prefix is accepted
            between = torch.where(total > 0, residual / total, 1.0)
            threshold = torch.where(lengths == i + 1, carried, between)
        is_accepted = (accept_u[:, i] < threshold) & (i < lengths)
        num_accepted = torch.where(is_accepted, i + 1, num_accepted)
    share = torch.stack(shares, dim=1).gather(1, num_accepted[:, None])[:, 0]
    return _recover(p, q, share, num_accepted, lengths)


def _at_drafts(
    p: Tensor, q: Tensor, draft_tokens: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [R, K] each: p and q of the draft tokens, and whether they exist in the vocabulary."""
    num_drafted, num_tokens = draft_tokens.shape[1], p.shape[-1]
    inside = (draft_tokens >= 0) & (draft_tokens < num_tokens)
    index = draft_tokens.clamp(0, num_tokens - 1)[..., None]
    p_draft = p[:, :num_drafted].gather(-1, index)[..., 0]
    q_draft = q.gather(-1, index)[..., 0]
    places = torch.arange(num_drafted, device=p.device)
    return p_draft, q_draft, inside & (places < lengths[:, None])


def _recover(
    p: Tensor, q: Tensor, share: Tensor, num_accepted: Tensor, lengths: Tensor
) -> AcceptedPrefixes:
    """Return the prefixes with the next token's weights: max(0, share p - q) if rejected, else p.

    share: [R], the part of p that counts at that place.
    """
    rows = torch.arange(len(p), device=p.device)
    last = p[rows, num_accepted]
    num_drafted = q.shape[1]
    if num_drafted:
        rejected = num_accepted < lengths
        q_last = q[rows, num_accepted.clamp(max=num_drafted - 1)]
        residual = (share[:, None] * last - q_last).clamp(min=0.0)
        # p == q to the last bit leaves no residual; then rejection had probability 0 too
        empty = residual.sum(dim=-1) <= 0.0
        last = torch.where((rejected & ~empty)[:, None], residual, last)
    return AcceptedPrefixes(num_accepted, last)
