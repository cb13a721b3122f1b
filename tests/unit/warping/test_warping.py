"""The sampled distribution equals that of transformers' own logits processors."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from paceline.contracts import SamplingParams
from paceline.warping import warp

SETTINGS = list(
    itertools.product((0.3, 1.0, 1.7), (0, 1, 5, 1000), (0.05, 0.8, 1.0), (0.0, 0.1, 0.9))
)


def transformers_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.zeros(len(logits), 1, dtype=torch.int64), logits).softmax(dim=-1)


def random_logits(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, 40, generator=generator) * 3
    if kind == "ties":
        return logits.round()
    if kind == "flat":
        return torch.zeros(4, 40)
    if kind == "banned":
        return logits.masked_fill(torch.rand(64, 40, generator=generator) < 0.7, float("-inf"))
    return logits


@pytest.mark.parametrize("kind", ["plain", "ties", "flat", "banned"])
def test_probabilities_equal_those_of_transformers_processors(kind: str) -> None:
    logits = random_logits(kind)
    for temperature, top_k, top_p, min_p in SETTINGS:
        params = SamplingParams(temperature, top_k, top_p, min_p, method="residual")
        ours, theirs = warp(logits, params), transformers_probs(logits, params)

        assert torch.equal(ours > 0, theirs > 0), params
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_warped_in_float32(dtype: torch.dtype) -> None:
    logits = random_logits("plain").to(dtype)
    params = SamplingParams(0.7, 5, 0.9, 0.05, method="residual")

    probs = warp(logits, params)

    assert probs.dtype == torch.float32
    assert torch.equal(probs, warp(logits.float(), params))


def test_warping_does_not_depend_on_the_leading_shape() -> None:
    logits = random_logits("plain")
    params = SamplingParams(0.7, 5, 0.9, 0.05, method="residual")

    assert torch.equal(warp(logits.view(8, 8, 40), params).view(64, 40), warp(logits, params))
    assert torch.equal(warp(logits[3], params), warp(logits, params)[3])


def test_logits_are_not_changed_in_place() -> None:
    logits = random_logits("plain")
    before = logits.clone()

    warp(logits, SamplingParams(1.0, 5, 0.9, 0.05, method="residual"))

    assert torch.equal(logits, before)
