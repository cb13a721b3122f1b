"""Chains whose tokens are drawn inside one call are those that are drawn one by one."""

from __future__ import annotations

import pytest
import torch
from support.compiled_models import NUM_IDS, compile_model, prefill, random_model, random_text

import paceline.noise as noise
from paceline.contracts import SamplingParams
from paceline.models.compiled import team
from paceline.models.compiled.sharing import TAGS
from paceline.models.packing import Draw, Span
from paceline.warping import warp

PROMPT = random_text(40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5, 2**64 - 1])
def test_a_drawn_chain_is_the_draws_one_by_one(dtype: str, seed: int) -> None:
    forward = compile_model(random_model(dtype))
    cache = forward.new_cache()
    for temperature in (0.2, 0.7, 1.0, 5.0):
        slots = [prefill(forward, cache, PROMPT) for _ in range(3)]
        spans = [Span(slots[0], 40, 2), Span(slots[1], 40, 1)]
        draws = [Draw(seed, 42, temperature), None]
        drawn, greedy = forward.chain([5, 6, 7], spans, cache, 6, NUM_IDS - 3, draws=draws)

        sampling = SamplingParams(temperature=temperature, seed=seed, method="invariant")
        fed, start, expected = [5, 6], 40, []
        for k in range(6):
            span = Span(slots[2], start, len(fed))
            logits = forward.score(fed, [span], None, cache, places=[len(fed) - 1]).logits
            assert logits is not None
            p = warp(logits[0, : NUM_IDS - 3], sampling)
            token = noise.draw(p, seed, 42 + k, noise.TARGET)
            expected.append(token)
            start, fed = start + len(fed), [token]

        assert drawn == expected
        [alone] = forward.chain([7], [Span(slots[1], 40, 1)], cache, 6, NUM_IDS - 3)
        assert greedy == alone
        for slot in slots:
            cache.release(slot)


def test_a_chain_that_is_not_finite_draws_no_token() -> None:
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[4, 0] = float("nan")
    forward = compile_model(model)
    cache = forward.new_cache()

    chains = forward.chain(
        [1], [Span(cache.acquire(), 0, 1)], cache, 2, NUM_IDS, draws=[Draw(1, 1, 1.0)]
    )

    assert chains == [[-1, -1]]


def test_tags_of_jobs_begin_again() -> None:
    forward = compile_model(random_model())
    cache = forward.new_cache()
    slot = cache.acquire()
    span = [Span(slot, 0, len(PROMPT))]
    expected = forward.hidden(PROMPT, span, None, cache)
    with team.borrowed() as lent:
        lent.workspace._tag = TAGS - 3

    for _ in range(6):
        assert torch.equal(forward.hidden(PROMPT, span, None, cache), expected)
    with team.borrowed() as lent:
        assert 0 < lent.workspace._tag < 10
