"""Weights of 8 bits: near the model's own answers, one text for all, and refused elsewhere by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compiled_models import path_to, prefill, random_model, random_text, random_tree

import paceline
from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.drafting.draft_model import DraftModel
from paceline.errors import ModelError
from paceline.models.compiled import processor
from paceline.models.compiled.forward import CompiledForward
from paceline.models.compiled.weights import pack_int8
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.visibility import look_at
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

KINDS = processor.available()
SHAPE: dict[str, Any] = {"hidden_size": 96, "head_dim": 24, "attention_bias": True}


def int8_of(model: Any) -> CompiledForward:
    windows = look_at(model, 1024, torch.device("cpu")).windows
    return CompiledForward(model, windows, 1024, "int8")


def test_packed_bytes_are_the_rounded_weights() -> None:
    weight = torch.randn(70, 45, generator=torch.Generator().manual_seed(0))

    packed = pack_int8(weight, 64)

    assert packed.shape == (2, 64 * 64 + 64 * 4)
    scales = packed[:, 64 * 64 :].contiguous().view(torch.float32).flatten()[:70]
    assert torch.equal(scales, weight.abs().amax(dim=1) / 127)
    blocks = packed[:, : 64 * 64].reshape(2, 4, 16, 16, 4)  # groups, blocks, words, outputs, inputs
    numbers = blocks.permute(0, 1, 3, 2, 4).reshape(128, 64).float() - 128
    restored = numbers[:70, :45] * scales[:, None]
    assert ((restored - weight).abs() <= scales[:, None] * 0.5001).all()
    assert not numbers[70:].any()
    assert not numbers[:, 45:].any()


@pytest.mark.parametrize(
    ("kind", "dtype"), [(KINDS[0], "float32"), *((kind, "bfloat16") for kind in KINDS)]
)
def test_logits_are_near_the_models_own(
    kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(processor.SETTING, kind)
    model = random_model(dtype, **SHAPE)
    forward, text = int8_of(model), random_text(90)
    cache = forward.new_cache()
    with torch.inference_mode():
        expected = model.float()(torch.tensor([text])).logits[0]
        hidden = forward.hidden(text, [Span(cache.acquire(), 0, 90)], None, cache)
        found = forward.logits(hidden)

    error = (found - expected).square().mean().sqrt()
    assert 0 < error < 0.05 * expected.std()


def test_bits_do_not_depend_on_batch_draft_or_tree() -> None:
    forward = int8_of(random_model("bfloat16", **SHAPE))
    text, more = random_text(70), random_text(13, seed=1)
    cache = forward.new_cache()
    slot = prefill(forward, cache, text)
    singly = [forward.score([t], [Span(slot, 70 + i, 1)], None, cache) for i, t in enumerate(more)]
    expected = torch.cat([s.logits for s in singly if s.logits is not None])

    slots = [prefill(forward, cache, text) for _ in range(3)]
    spans = [Span(s, 70, 13) for s in slots]
    found = forward.score(more * 3, spans, None, cache)
    assert found.logits is not None
    assert torch.equal(found.logits, expected.repeat(3, 1))
    assert found.choices == [s.choices[0] for s in singly] * 3

    hidden = forward.hidden(more, [Span(slots[0], 70, 13)], None, cache)
    assert torch.equal(forward.logits(hidden), expected)

    parents = random_tree(13, seed=2)
    tree = forward.score(more, [Span(slots[1], 70, 13)], [parents], cache).logits
    assert tree is not None
    for place in range(13):
        path = [more[k] for k in path_to(parents, place)]
        row = prefill(forward, cache, text)
        chain = forward.score(path, [Span(row, 70, len(path))], None, cache).logits
        assert chain is not None
        assert torch.equal(tree[place], chain[-1])


def test_a_number_that_is_not_finite_is_seen() -> None:
    model = random_model("bfloat16", **SHAPE)
    forward = int8_of(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = float("nan")
    cache = forward.new_cache()

    spans = [Span(cache.acquire(), 0, 1), Span(cache.acquire(), 0, 1)]

    scores = forward.score([2, 3], spans, None, cache)

    assert scores.choices[0] >= 0
    assert scores.choices[1] == -1


def test_another_forward_refuses_it_by_name() -> None:
    with pytest.raises(ModelError, match="'weights: int8' needs the compiled forward"):
        LanguageModel(tiny_model("gpt2"), "tiny", weights="int8")
    with pytest.raises(ModelError, match="'forward: lean'; remove 'weights: int8'"):
        LanguageModel(tiny_model("llama"), "tiny", "lean", weights="int8")


def test_a_drafter_of_8_bits_changes_no_text_and_a_target_says_so() -> None:
    def complete(weights: str, drafter: str) -> paceline.Completion:
        small = random_model("bfloat16", vocab_size=259, num_hidden_layers=1)
        model = LanguageModel(small, "small", weights="int8")
        section = ModelSection.model_validate({"model": "-", "weights": weights})
        parts = build_from_objects(
            random_model("bfloat16", vocab_size=259),
            byte_tokenizer(),
            {"small": DraftModel("small", model, 4, 259, 259)},
            Config(target=section),
        )
        return Pace(parts).complete([1, 2, 3], drafter=drafter, max_new_tokens=24, ignore_eos=True)

    plain, drafted, rounded = (
        complete("own", "none"),
        complete("own", "small"),
        complete("int8", "small"),
    )

    assert plain.token_ids == drafted.token_ids
    assert (plain.weights, rounded.weights) == ("own", "int8")
