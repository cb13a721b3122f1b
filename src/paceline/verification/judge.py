"""The two ways a draft is judged, for R rows at once.

p = target's, q = drafter's distribution after the same warping; K = draft length; V = vocabulary.
`judge_matches` serves greedy decoding, deterministic drafts and drafter-invariant sampling
(arXiv 2408.07978): the target's own token is drawn at every place and the draft is kept while it
equals it. `judge_residual` is speculative sampling (arXiv 2211.17192, algorithm 1): accept with
min(1, p/q), else draw from the normalised max(0, p - q). The residual is a distribution already and
is never warped again. A draft token outside the vocabulary counts as rejected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.contracts import Verdicts
from paceline.noise import race

if TYPE_CHECKING:
    from torch import Tensor


def _first_false(keep: Tensor) -> Tensor:
    """[R, K] bool -> [R] how many of the leading entries are True."""
    return keep.to(torch.int64).cumprod(dim=-1).sum(dim=-1)


def judge_matches(choices: Tensor, draft_tokens: Tensor, lengths: Tensor) -> Verdicts:
    """Keep a draft while it equals what the target itself chose.

    choices: [R, K+1] the target's token at each place. draft_tokens: [R, K]. lengths: [R].
    """
    places = torch.arange(draft_tokens.shape[1], device=draft_tokens.device)
    keep = (choices[:, :-1] == draft_tokens) & (places < lengths[:, None])
    num_accepted = _first_false(keep)
    return Verdicts(num_accepted, choices.gather(1, num_accepted[:, None])[:, 0])


def judge_residual(
    p: Tensor, q: Tensor, draft_tokens: Tensor, lengths: Tensor, accept_u: Tensor, noise: Tensor
) -> Verdicts:
    """Speculative sampling of stochastic drafts.

    p: [R, K+1, V]. q: [R, K, V], each draft token's own distribution. draft_tokens: [R, K].
    lengths: [R]. accept_u: [R, K] uniforms. noise: [R, K+1, V] exponentials, from which the
    recovered or bonus token is drawn.
    """
    num_rows, num_drafted = draft_tokens.shape
    num_tokens = p.shape[-1]
    inside = (draft_tokens >= 0) & (draft_tokens < num_tokens)
    index = draft_tokens.clamp(0, num_tokens - 1)[..., None]
    p_draft = p[:, :num_drafted].gather(-1, index)[..., 0]
    q_draft = q.gather(-1, index)[..., 0]
    places = torch.arange(num_drafted, device=p.device)
    # u < p/q without dividing: q may underflow to 0 at a token that was nevertheless drawn
    keep = (accept_u * q_draft < p_draft) & inside & (places < lengths[:, None])
    num_accepted = _first_false(keep)
    rows = torch.arange(num_rows, device=p.device)
    last = p[rows, num_accepted]
    if num_drafted:
        rejected = num_accepted < lengths
        q_last = q[rows, num_accepted.clamp(max=num_drafted - 1)]
        residual = (last - q_last).clamp(min=0.0)
        # p == q to the last bit leaves no residual; then rejection had probability 0 too
        empty = residual.sum(dim=-1) <= 0.0
        last = torch.where((rejected & ~empty)[:, None], residual, last)
    return Verdicts(num_accepted, race(last, noise[rows, num_accepted]))
