"""Logits to the distribution that is sampled: temperature, top-k, top-p, min-p, in that order.

The only place for these settings. Target and drafter go through the same function with the same
parameters; otherwise the emitted distribution would not be the target's. Residuals never come
through here. The order and the tie rules are those of transformers' logits processors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.contracts import SamplingParams


def check_sampling(params: SamplingParams) -> None:
    """Raise RequestError, naming the setting, if a value is out of range or contradicts another."""
    if not 0.0 <= params.temperature < float("inf"):
        raise RequestError(f"temperature must be 0 (greedy) or positive, got {params.temperature}")
    if params.top_k < 0:
        raise RequestError(f"top_k must be 0 (off) or positive, got {params.top_k}")
    if not 0.0 < params.top_p <= 1.0:
        raise RequestError(f"top_p must be in (0, 1], got {params.top_p}")
    if not 0.0 <= params.min_p < 1.0:
        raise RequestError(f"min_p must be in [0, 1), got {params.min_p}")
    if not -(2**63) <= params.seed < 2**63:
        raise RequestError(f"seed must fit in 64 bits with its sign, got {params.seed}")
    if params.temperature == 0.0:
        filters = {"top_k": params.top_k != 0, "top_p": params.top_p != 1.0}
        filters["min_p"] = params.min_p != 0.0
        given = [name for name, is_set in filters.items() if is_set]
        if given:
            raise RequestError(
                f"{', '.join(given)} given with temperature 0, where the most likely token is "
                "always taken; set a temperature above 0 or drop it"
            )
        if params.method != "greedy":
            raise RequestError(
                f"sampling method '{params.method}' given with temperature 0; "
                "set a temperature above 0 or leave the method out"
            )
    elif params.method == "greedy":
        raise RequestError("method 'greedy' needs temperature 0")


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities under the sampling parameters, float32.

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
    """Drop the least likely tokens whose total is at most 1 - top_p; the best one always stays."""
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    drop[..., -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
