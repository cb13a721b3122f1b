"""From logits to the sampled distribution: temperature, top-k, top-p, min-p, in that order.

The only module for these settings. Target and drafter are warped by the same function with the same
parameters; otherwise the emitted distribution would not be the target's. Residuals are never warped.
The order and the tie rules are those of transformers' logits processors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.contracts import SamplingParams


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return probabilities under the sampling parameters, float32.

    logits: [..., V], any float dtype; temperature must be above 0. Returns [..., V].
    """
    logits = logits.float() / params.temperature
    if params.top_k and params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if params.top_p < 1.0:
        logits = _keep_nucleus(logits, params.top_p)
    probs = logits.softmax(dim=-1)
    if params.min_p > 0.0:
        floor = params.min_p * probs.amax(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Mask the least likely tokens whose total is at most 1 - top_p, but never the most likely token."""
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    drop[..., -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
