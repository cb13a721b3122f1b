"""Choices are the most likely ids, and a chain is what its steps one by one would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.compiled_models import (
    NUM_IDS,
    compile_model,
    hidden_of,
    prefill,
    random_model,
    random_text,
)

from paceline.models.packing import Span
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.models.compiled.forward import CompiledForward
    from paceline.models.scores import Scores

DTYPES = ("bfloat16", "float32")
NAN, INF = float("nan"), float("inf")


def score(forward: CompiledForward, text: Sequence[int], wants_logits: bool = True) -> Scores:
    rows = forward.new_cache()
    span = Span(rows.acquire(), 0, len(text))
    return forward.score(text, [span], None, rows, wants_logits)


@pytest.mark.parametrize("num_ids", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_choices_are_the_most_likely_ids(dtype: str, num_ids: int) -> None:
    forward = compile_model(random_model(dtype, vocab_size=num_ids))
    text = random_text(140, num_ids=num_ids)
    scores = score(forward, text)

    assert scores.logits is not None and scores.logits.shape == (140, num_ids)
    assert scores.logits.dtype == torch.float32
    assert scores.choices == scores.logits.argmax(dim=-1).tolist()
    assert score(forward, text, wants_logits=False) == (scores.choices, None)


def test_of_equal_logits_the_lowest_id_is_chosen() -> None:
    model: Any = random_model(vocab_size=300)
    text = random_text(30, num_ids=300)
    best = score(compile_model(model), text).choices[-1]
    twins = sorted({best, 3, 17, 70, 150, 299} - {0})
    with torch.no_grad():
        model.lm_head.weight[twins] = model.lm_head.weight[best].clone()

    for first in range(len(twins)):
        assert score(compile_model(model), text).choices[-1] == twins[first]
        with torch.no_grad():
            model.lm_head.weight[twins[first]] = 0


@pytest.mark.parametrize("place", [0, 15, 16, 63, 64, 96])
@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_id_is_chosen_if_a_logit_is_not_finite(dtype: str, number: float, place: int) -> None:
    model: Any = random_model(dtype)
    text = random_text(20)
    signs = hidden_of(compile_model(model), text)[-1].sign()
    model.lm_head.weight.data[place] = NAN if number != number else 3e38 * signs
    scores = score(compile_model(model), text)

    assert scores.logits is not None
    assert str(scores.logits[-1, place].item()) == str(number)
    assert scores.choices[-1] == -1


def test_an_infinitely_unlikely_id_does_not_matter() -> None:
    model: Any = random_model()
    text = random_text(20)
    before = score(compile_model(model), text).choices[-1]
    signs = hidden_of(compile_model(model), text)[-1].sign()
    model.lm_head.weight.data[before] = -3e38 * signs
    scores = score(compile_model(model), text)

    assert scores.logits is not None and scores.logits[-1, before] == -INF
    assert scores.choices[-1] == scores.logits[-1].argmax() != before


@pytest.mark.parametrize("part", ["self_attn.v_proj", "self_attn.k_proj", "mlp.gate_proj"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_no_numbers_reach_the_choice(dtype: str, part: str) -> None:
    model: Any = random_model(dtype)
    model.model.layers[0].get_submodule(part).weight.data[3, 5] = NAN

    assert score(compile_model(model), random_text(20)).choices == [-1] * 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_damaged_row_harms_no_other_and_not_the_next_in_its_slot(dtype: str) -> None:
    model: Any = random_model(dtype)
    model.model.embed_tokens.weight.data[9] = NAN
    forward, rows = compile_model(model), None
    healthy, damaged = [t % 9 for t in random_text(40)], [9] * 70
    expected, rows = hidden_of(forward, healthy), forward.new_cache()
    slot, other = rows.acquire(), rows.acquire()
    tokens, spans = [*damaged, *healthy], [Span(slot, 0, 70), Span(other, 0, 40)]
    hidden = forward.hidden(tokens, spans, None, rows)

    assert hidden[:70].isnan().all() and torch.equal(hidden[70:], expected)
    rows.clear(slot)
    rows.release(slot)
    assert rows.acquire() == slot
    assert torch.equal(forward.hidden(healthy, [Span(slot, 0, 40)], None, rows), expected)


def step_by_step(
    forward: CompiledForward, text: Sequence[int], K: int, limit: int, skip: LayerSubset | None
) -> list[int]:
    """Return K greedy ids below a limit after a text, from logits of single forwards."""
    whole = list(text)
    rows = forward.new_cache()
    slot, start = rows.acquire(), 0
    for _ in range(K):
        new = whole[start:]
        hidden = forward.hidden(new, [Span(slot, start, len(new))], None, rows, skip)
        start = len(whole)
        whole.append(int(forward.logits(hidden[-1:])[0, :limit].argmax()))
    return whole[len(text) :]


SKIP = LayerSubset(frozenset({1}), frozenset({0}))
CHAINS = [
    ([20], [1], 1),
    ([20], [2], 5),
    ([61], [1], 12),
    ([3, 63, 0, 100], [1, 2, 1, 1], 7),
    ([0], [40], 4),
    ([5, 130], [33, 1], 3),
    ([10 * k for k in range(16)], [1 + k % 2 for k in range(16)], 6),
]


@pytest.mark.parametrize(("starts", "widths", "K"), CHAINS)
@pytest.mark.parametrize("limit", [NUM_IDS, 64, 40, 1])
@pytest.mark.parametrize("skip", [None, SKIP])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_chain_is_its_steps_one_by_one(
    architecture: str,
    dtype: str,
    skip: LayerSubset | None,
    limit: int,
    starts: list[int],
    widths: list[int],
    K: int,
) -> None:
    forward = compile_model(random_model(dtype, architecture))
    texts = [
        random_text(n + w, seed) for seed, (n, w) in enumerate(zip(starts, widths, strict=True))
    ]
    rows, spans = forward.new_cache(), []
    for text, width in zip(texts, widths, strict=True):
        slot, start = rows.acquire(), len(text) - width
        if start:
            forward.hidden(text[:start], [Span(slot, 0, start)], None, rows, skip)
        spans.append(Span(slot, start, width))
    tokens = [token for text, s in zip(texts, spans, strict=True) for token in text[s.start :]]
    chains = forward.chain(tokens, spans, rows, K, limit, skip)

    assert chains == [step_by_step(forward, text, K, limit, skip) for text in texts]
    if skip is None:  # all drafted tokens but the last are cached
        for text, chain, span in zip(texts, chains, spans, strict=True):
            whole = [*text, *chain]
            hidden = forward.hidden([5], [Span(span.slot, len(whole) - 1, 1)], None, rows)
            assert torch.equal(hidden, hidden_of(forward, [*whole[:-1], 5])[-1:])


def test_a_chain_of_a_broken_model_has_no_ids() -> None:
    model: Any = random_model()
    model.lm_head.weight.data[50] = NAN
    forward = compile_model(model)
    rows = forward.new_cache()
    spans = [Span(prefill(forward, rows, random_text(9)), 9, 1)]

    assert forward.chain([1], spans, rows, 3, NUM_IDS) == [[-1] * 3]
    assert min(forward.chain([1], spans, rows, 3, 50)[0]) >= 0  # the id is not among those
