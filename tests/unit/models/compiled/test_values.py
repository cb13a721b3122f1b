"""Logits are those of transformers' own forward, for odd shapes and with every kind of kernels."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.compiled_models import (
    compile_model,
    path_to,
    prefill,
    random_model,
    random_text,
    random_tree,
)

from paceline.errors import ConfigError
from paceline.models.compiled import processor
from paceline.models.compiled.family import why_not_compiled
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.sublayers import LayerSubset
from paceline.testing.tiny_models import ARCHITECTURES, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from paceline.models.compiled.forward import CompiledForward

FITTING = [name for name in ARCHITECTURES if why_not_compiled(tiny_model(name)) is None]
SHAPES: dict[str, dict[str, Any]] = {
    **{f"head_{n}": {"hidden_size": 96, "head_dim": n} for n in (8, 16, 32, 64, 80, 96, 128)},
    "hidden_36": {"hidden_size": 36, "head_dim": 8},
    "hidden_100": {"hidden_size": 100, "head_dim": 20},
    "hidden_200": {"hidden_size": 200, "head_dim": 50},
    "mlp_33": {"intermediate_size": 33},
    "mlp_200": {"intermediate_size": 200},
    "vocabulary_5": {"vocab_size": 5},
    "vocabulary_64": {"vocab_size": 64},
    "vocabulary_1000": {"vocab_size": 1000},
    "three_heads": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
    "seven_of_fourteen": {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 7},
    "one_kv_head": {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "tanh_gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "five_layers": {"num_hidden_layers": 5},
    "qwen2_biases": {"architecture": "qwen2", "hidden_size": 72, "head_dim": 18},
    "qwen3_norms": {"architecture": "qwen3", "hidden_size": 72, "head_dim": 24},
    "window_1": {"architecture": "mistral", "sliding_window": 1},
    "window_32": {"architecture": "mistral", "sliding_window": 32},
    "1024": {"hidden_size": 1024, "head_dim": 64, "intermediate_size": 300},
} | {name: {"architecture": name} for name in FITTING}
FEW = ("head_80", "biases", "window_32", "qwen3_norms", "1024")
KINDS = processor.available()


def kinds_and_dtypes() -> list[tuple[str, str]]:
    """Return what differs: float32 has one code for all vectors of 512 bits."""
    return [(kind, "bfloat16") for kind in KINDS] + [
        (k, "float32") for k in dict.fromkeys((KINDS[0], "generic"))
    ]


def logits_of(forward: CompiledForward, text: list[int]) -> torch.Tensor:
    rows = forward.new_cache()
    half = len(text) // 2
    slot = prefill(forward, rows, text[:half])
    before = forward.hidden(text[:half], [Span(slot, 0, half)], None, rows)
    scores = forward.score(text[half:], [Span(slot, half, len(text) - half)], None, rows)
    assert scores.logits is not None
    return torch.cat([forward.logits(before), scores.logits])


def theirs(model: PreTrainedModel, text: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([text])).logits[0]
        return logits.float()


def check_values(dtype: str, settings: dict[str, Any]) -> None:
    model = random_model(dtype, **settings)
    text = random_text(90, num_ids=min(97, model.config.vocab_size))
    exact = theirs(copy.deepcopy(model).float(), text)
    found = logits_of(compile_model(model), text)
    if dtype == "float32":
        assert (found - exact).abs().max() <= 1e-3 * exact.std()
    else:
        their_error = (theirs(model, text) - exact).square().mean().sqrt()
        assert (found - exact).square().mean().sqrt() <= 1.1 * their_error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape: str, dtype: str) -> None:
    check_values(dtype, SHAPES[shape])


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize(("kind", "dtype"), kinds_and_dtypes())
def test_every_kind_of_kernels_has_the_right_values(
    kind: str, dtype: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(processor.SETTING, kind)

    check_values(dtype, SHAPES[shape])


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize(("kind", "dtype"), kinds_and_dtypes())
def test_every_kind_of_kernels_has_bits_of_a_row_alone(
    kind: str, dtype: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(processor.SETTING, kind)
    forward, text = compile_model(random_model(dtype, **SHAPES[shape])), random_text(100)
    rows = forward.new_cache()
    slot, other = rows.acquire(), rows.acquire()
    whole = forward.hidden(text, [Span(slot, 0, 100)], None, rows)

    assert forward.kernels == kind
    for start, width in ((0, 1), (1, 2), (3, 6), (31, 13), (44, 56), (70, 30)):
        spans = [Span(slot, start, width), Span(other, 0, 7)]
        mine = forward.hidden([*text[start : start + width], *text[:7]], spans, None, rows)
        assert torch.equal(mine, torch.cat([whole[start : start + width], whole[:7]]))
    nodes, parents = random_text(20, 1), random_tree(20, 1)
    tree = forward.hidden(nodes, [Span(slot, 50, 20)], [parents], rows)
    path = max((path_to(parents, place) for place in range(20)), key=len)
    slot = prefill(forward, rows, text[:50])
    chain = forward.hidden([nodes[k] for k in path], [Span(slot, 50, len(path))], None, rows)
    assert torch.equal(tree[path], chain)


def test_a_kind_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "available", lambda: ("avx512", "generic"))
    for wrong in ("amx", "", "fastest"):
        monkeypatch.setenv(processor.SETTING, wrong)
        with pytest.raises(ConfigError, match=f"is '{wrong}'.* runs avx512, generic; unset"):
            processor.kernels()
    monkeypatch.setenv(processor.SETTING, "generic")
    assert processor.kernels() == "generic"


def test_generic_kernels_run_everywhere_and_the_fastest_are_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(processor.SETTING, raising=False)

    assert KINDS[-1] == "generic"
    assert processor.kernels() == KINDS[0]


SUBSETS = [
    LayerSubset(frozenset({0}), frozenset()),
    LayerSubset(frozenset({1}), frozenset({0})),
    LayerSubset(frozenset(), frozenset({0, 1})),
    LayerSubset.everything(2),
]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("architecture", FITTING)
def test_sublayers_left_out_are_those_of_transformers(
    architecture: str, subset: LayerSubset
) -> None:
    model, text = random_model("float32", architecture), torch.tensor(random_text(30))
    pair = [LanguageModel(model, kind, kind) for kind in ("compiled", "transformers")]
    with torch.inference_mode():
        ours, others = (m.forward(text, [Span(m.acquire(), 0, 30)], skip=subset) for m in pair)

    torch.testing.assert_close(ours, others, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", FITTING)
def test_trees_have_the_values_of_transformers(architecture: str) -> None:
    model, text = random_model("float32", architecture), torch.tensor(random_text(40))
    pair = [LanguageModel(model, kind, kind) for kind in ("compiled", "transformers")]
    found = []
    for ours in pair:
        slot = ours.acquire()
        with torch.inference_mode():
            ours.forward(text[:20], [Span(slot, 0, 20)])
            found.append(ours.forward(text[20:], [Span(slot, 20, 20)], [random_tree(20, 7)]))

    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
