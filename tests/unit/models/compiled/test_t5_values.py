"""The compiled forward gives the logits of transformers' T5 decoders, and refuses what it cannot run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.compiled_models import random_text, random_tree
from support.t5_models import T5_SHAPES, begin, feed, load_t5, random_source, random_t5
from torch import nn

from paceline.models.compiled import family, processor
from paceline.models.compiled.forward import CompiledForward
from paceline.models.forward_choice import forward_before_weights
from paceline.models.language_model import LanguageModel
from paceline.models.model_facts import count_packed_bytes
from paceline.models.self_checks import check_packed_forward
from paceline.models.sublayers import LayerSubset

KINDS = processor.available()
SOURCES = (5, 140, 33, 64)  # tokens
TEXTS = (70, 9, 40, 100)


def theirs(model: Any, source: list[int], text: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        ids, decoded = torch.tensor([source]), torch.tensor([text])
        logits: torch.Tensor = model(input_ids=ids, decoder_input_ids=decoded).logits[0]
        return logits.float()


def ours(model: LanguageModel, sources: list[list[int]], texts: list[list[int]]) -> torch.Tensor:
    """Return the logits of all texts, fed in two pieces with all rows in each forward."""
    slots = [begin(model, source) for source in sources]
    parts: dict[int, list[torch.Tensor]] = {slot: [] for slot in slots}
    halves = {slot: len(text) // 3 for slot, text in zip(slots, texts, strict=True)}
    first = {s: (0, t[: halves[s]]) for s, t in zip(slots, texts, strict=True)}
    second = {s: (halves[s], t[halves[s] :]) for s, t in zip(slots, texts, strict=True)}
    for pieces in (first, dict(reversed(second.items()))):
        for slot, hidden in feed(model, pieces).items():
            parts[slot].append(hidden)
    with torch.inference_mode():
        return torch.cat([model.unembed(torch.cat(parts[slot])) for slot in slots])


def check_values(dtype: str, settings: dict[str, Any]) -> None:
    model = random_t5(dtype, **settings)
    sources = [random_source(n, seed) for seed, n in enumerate(SOURCES)]
    texts = [random_text(n, seed) for seed, n in enumerate(TEXTS)]
    pairs = list(zip(sources, texts, strict=True))
    whole = copy.deepcopy(model).float()
    exact = torch.cat([theirs(whole, *pair) for pair in pairs])
    found = ours(load_t5(model), sources, texts)

    if dtype == "float32":
        assert (found - exact).abs().max() <= 1e-3 * exact.std()
    else:
        their_error = torch.cat([theirs(model, *pair) for pair in pairs]) - exact
        error = (found - exact).square().mean().sqrt()
        assert error <= 1.1 * their_error.square().mean().sqrt()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", T5_SHAPES)
def test_logits_are_those_of_transformers(shape: str, dtype: str) -> None:
    check_values(dtype, T5_SHAPES[shape])


@pytest.mark.parametrize("shape", ["t5", "head_20"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((k, "bfloat16") for k in KINDS[1:]), ("generic", "float32")]
)
def test_every_kind_of_kernels_has_the_right_values(
    kind: str, dtype: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(processor.SETTING, kind)

    check_values(dtype, T5_SHAPES[shape])


@pytest.mark.parametrize("shape", ["t5", "umt5", "head_64"])
def test_logits_of_8_bit_weights_are_near_the_models_own(shape: str) -> None:
    model = random_t5("bfloat16", **T5_SHAPES[shape])
    source, text = random_source(40), random_text(50)
    found = ours(load_t5(model, weights="int8"), [source], [text])
    exact = theirs(model.float(), source, text)

    error = (found - exact).square().mean().sqrt()
    assert 0 < error < 0.1 * exact.std()


@pytest.mark.parametrize("architecture", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_at_load_accepts_it(architecture: str, dtype: str) -> None:
    model = load_t5(random_t5(dtype, architecture), "auto")

    assert (model.forward_kind, model.why_not_compiled) == ("compiled", None)
    assert model.exact
    check_packed_forward(model)


@pytest.mark.parametrize("shape", ["t5", "umt5"])
def test_trees_have_the_values_of_transformers(shape: str) -> None:
    model = random_t5(**T5_SHAPES[shape])
    source, before, nodes = random_source(20), random_text(25), random_text(20, 1)
    found = []
    for kind in ("compiled", "transformers"):
        loaded = load_t5(model, kind)  # type: ignore[arg-type]
        slot = begin(loaded, source)
        feed(loaded, {slot: (0, before)})
        found.append(feed(loaded, {slot: (25, nodes)}, {slot: random_tree(20, 7)})[slot])

    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


SUBSETS = [
    LayerSubset(frozenset({0}), frozenset()),
    LayerSubset(frozenset({1}), frozenset({0, 2})),
    LayerSubset(frozenset(), frozenset({1})),
    LayerSubset.everything(3),
]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_without_attention_sees_neither_text_nor_source(
    dtype: str, subset: LayerSubset
) -> None:
    model = random_t5(dtype)
    source, text = random_source(30), random_text(40)
    skipping = load_t5(model)
    slot = begin(skipping, source)
    found = feed(skipping, {slot: (0, text)}, skip=subset)[slot]
    silent = copy.deepcopy(model)
    for index, block in enumerate(silent.decoder.block):
        if index in subset.attention:
            block.layer[0].SelfAttention.o.weight.data.zero_()
            block.layer[1].EncDecAttention.o.weight.data.zero_()
        if index in subset.mlp:
            block.layer[2].DenseReluDense.wo.weight.data.zero_()
    other = load_t5(silent)

    assert torch.equal(found, feed(other, {begin(other, source): (0, text)})[0])


def with_float32_part() -> Any:
    model = random_t5("bfloat16")
    for block in model.decoder.block:
        block.layer[2].DenseReluDense.wo.float()
    return model


def with_odd_linear() -> Any:
    class Odd(nn.Linear):
        """A linear layer of another type."""

    model = random_t5()
    model.decoder.block[1].layer[1].EncDecAttention.q = Odd(32, 32, bias=False)
    return model


def with_hook() -> Any:
    model = random_t5()
    model.decoder.block[0].layer[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_float32_part, "its weights have several dtypes or devices"),
        (lambda: random_t5(feed_forward_proj="gated-tanh"), "its activation is tanh"),
        (with_odd_linear, "Odd stands where a plain linear layer should"),
        (with_hook, "its modules have hooks"),
        (lambda: random_t5().half(), "its weights are float16"),
    ],
)
def test_variants_that_do_not_fit_are_refused_by_name(make: Any, reason: str) -> None:
    assert family.why_not_compiled(make()) == reason


def test_a_model_of_two_dtypes_runs_by_transformers_forward() -> None:
    model = load_t5(with_float32_part(), "auto")

    assert model.forward_kind == "transformers"
    check_packed_forward(model)


@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("shape", ["t5", "mt5", "head_64"])
def test_packed_bytes_are_known_before_the_weights(shape: str, weights: Any) -> None:
    model = random_t5("bfloat16", **T5_SHAPES[shape])
    expected = load_t5(model, weights=weights).packed_bytes

    assert count_packed_bytes(model, weights) == expected > 0


def test_the_forward_is_known_before_the_weights() -> None:
    from paceline.config import ModelSection

    section = ModelSection.model_validate({"model": "-"})
    given = (section, False, torch.float32, torch.device("cpu"))
    chosen = forward_before_weights(random_t5(), "target", *given)

    assert (chosen.kind, chosen.why_not_compiled) == ("compiled", None)


def test_tables_of_biases_are_no_longer_than_needed() -> None:
    """T5 has no last position, and its context counts as a million."""
    model = random_t5(architecture="umt5")
    forward = CompiledForward(model, dict.fromkeys(range(3)), 1 << 20)
    tables = forward.packed._positions
    sizes = []
    for length in (1, 200, 300, 1000, 5000):
        forward.packed.reserve_positions(length)
        sizes.append(tables._length)

    assert sizes == [256, 256, 512, 1024, 5000]
    assert len(tables._biases) == 3
    shared = CompiledForward(random_t5(), dict.fromkeys(range(3)), 1 << 20)
    assert len(shared.packed._positions._biases) == 1
