"""How stochastic drafts are judged, for R chains at once.

p = target's, q = drafter's distribution after the same warping; K = draft length; V = vocabulary.
`accept_residual` is speculative sampling (arXiv 2211.17192, algorithm 1): accept with min(1, p/q),
else draw from the normalised max(0, p - q). `accept_block` accepts the tokens of a chain jointly
(arXiv 2403.10444, algorithm 2) and keeps no fewer of them on average. A residual is a distribution
already and is never warped again. A draft token outside the vocabulary counts as rejected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.contracts import Verdicts

if TYPE_CHECKING:
    from torch import Tensor


def accept_residual(
    p: Tensor, q: Tensor, draft_tokens: Tensor, lengths: Tensor, accept_u: Tensor
) -> Verdicts:
    """Speculative sampling of stochastic drafts, token by token.

    p: [R, K+1, V]. q: [R, K, V], each draft token's own distribution. draft_tokens: [R, K].
    lengths: [R]. accept_u: [R, K] uniforms.
    """
    p_draft, q_draft, usable = _at_drafts(p, q, draft_tokens, lengths)
    # u < p/q without dividing: q may underflow to 0 at a token that was nevertheless drawn
    keep = (accept_u * q_draft < p_draft) & usable
    num_accepted = keep.to(torch.int64).cumprod(dim=-1).sum(dim=-1)
    return _recover(p, q, p.new_ones(len(p)), num_accepted, lengths)


def accept_block(
    p: Tensor, q: Tensor, draft_tokens: Tensor, lengths: Tensor, accept_u: Tensor
) -> Verdicts:
    """Block verification of stochastic drafts; arguments as in `accept_residual`.

    b_i = min(1, b_{i-1} p/q) is the share of the first i tokens' weight that p can carry, b_0 = 1. The
    longest prefix i with u_i < h_i is kept: h_i = R_i / (R_i + 1 - b_i), where R_i is the mass of
    max(0, b_i p - q) at the next place, and h_K = b_K. All drafts and uniforms of a round bear on what
    is kept, so none of them may be drawn again with the same noise in the next round.
    """
    num_rows, num_drafted = draft_tokens.shape
    p_draft, q_draft, usable = _at_drafts(p, q, draft_tokens, lengths)
    num_accepted = torch.zeros(num_rows, dtype=torch.int64, device=p.device)
    carried = p.new_ones(num_rows)
    shares = [carried]
    for i in range(num_drafted):
        grown = carried * p_draft[:, i]
        # min(1, grown / q) without dividing by a q that underflowed
        carried = torch.where(grown < q_draft[:, i], grown / q_draft[:, i], (grown > 0).to(p))
        carried = torch.where(usable[:, i], carried, 0.0)
        shares.append(carried)
        odds = carried
        if i + 1 < num_drafted:
            left = (carried[:, None] * p[:, i + 1] - q[:, i + 1]).clamp(min=0.0).sum(dim=-1)
            total = left + 1.0 - carried
            # p == q to the last bit leaves nothing to weigh: the prefix is kept
            between = torch.where(total > 0, left / total, 1.0)
            odds = torch.where(lengths == i + 1, carried, between)
        keep = (accept_u[:, i] < odds) & (i < lengths)
        num_accepted = torch.where(keep, i + 1, num_accepted)
    share = torch.stack(shares, dim=1).gather(1, num_accepted[:, None])[:, 0]
    return _recover(p, q, share, num_accepted, lengths)


def _at_drafts(
    p: Tensor, q: Tensor, draft_tokens: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[R, K] each: p and q of the draft tokens, and which of these exist and are in the vocabulary."""
    num_drafted, num_tokens = draft_tokens.shape[1], p.shape[-1]
    inside = (draft_tokens >= 0) & (draft_tokens < num_tokens)
    index = draft_tokens.clamp(0, num_tokens - 1)[..., None]
    p_draft = p[:, :num_drafted].gather(-1, index)[..., 0]
    q_draft = q.gather(-1, index)[..., 0]
    places = torch.arange(num_drafted, device=p.device)
    return p_draft, q_draft, inside & (places < lengths[:, None])


def _recover(
    p: Tensor, q: Tensor, share: Tensor, num_accepted: Tensor, lengths: Tensor
) -> Verdicts:
    """The distribution of the token behind what was kept: max(0, share p - q) after a rejection, else p.

    share: [R], how much of p counts at that place.
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
    return Verdicts(num_accepted, last)
