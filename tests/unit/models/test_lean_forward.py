"""The lean forward gives transformers' results, and refuses models that it cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paceline.errors import ModelError
from paceline.models import lean, products
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.self_checks import check_packed_forward
from paceline.testing.tiny_models import ARCHITECTURES, LEAN_ARCHITECTURES, tiny_model

PROMPTS = (17, 3, 21)


def hidden_states(model: LanguageModel) -> torch.Tensor:
    """Return the hidden states of ragged prefill, one chain, a tree with a chain, and all rows."""
    generator = torch.Generator().manual_seed(3)

    def tokens(n: int) -> torch.Tensor:
        return torch.randint(259, (n,), generator=generator)

    a, b, c = (model.acquire() for _ in PROMPTS)
    spans = [Span(slot, 0, n) for slot, n in zip((a, b, c), PROMPTS, strict=True)]
    with torch.inference_mode():
        parts = [
            model.forward(tokens(sum(PROMPTS)), spans),
            model.forward(tokens(4), [Span(b, 3, 4)]),
            model.forward(tokens(5), [Span(a, 17, 3), Span(c, 21, 2)], [[-1, -1], None]),
            model.forward(tokens(3), [Span(a, 19, 1), Span(b, 6, 1), Span(c, 23, 1)]),
        ]
        return torch.cat(parts)


@pytest.mark.parametrize("architecture", LEAN_ARCHITECTURES)
def test_hidden_states_and_logits_are_those_of_transformers(architecture: str) -> None:
    model = tiny_model(architecture)
    ours = LanguageModel(model, "ours", "lean")
    theirs = LanguageModel(model, "theirs", "transformers")

    assert (ours.forward_kind, theirs.forward_kind) == ("lean", "transformers")
    expected = hidden_states(theirs)
    torch.testing.assert_close(hidden_states(ours), expected, rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(
            ours.unembed(expected[None]), theirs.unembed(expected[None]), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("architecture", LEAN_ARCHITECTURES)
def test_in_bfloat16_it_strays_no_further_than_transformers_does(architecture: str) -> None:
    exact = hidden_states(LanguageModel(tiny_model(architecture), "exact", "transformers"))
    model = tiny_model(architecture).to(torch.bfloat16)
    ours = hidden_states(LanguageModel(model, "ours", "lean")).float()
    theirs = hidden_states(LanguageModel(model, "theirs", "transformers")).float()

    assert (ours - exact).square().mean() <= 1.5 * (theirs - exact).square().mean()


def norms_that_only_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean._Norm, "__call__", lambda self, x: x * self._weight)


def turned_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    at = lean._RotaryTable.at

    def wrong(self: Any, packed: Any) -> Any:
        cos, sin = at(self, packed)
        return cos, -sin

    monkeypatch.setattr(lean._RotaryTable, "at", wrong)


def angles_of_the_place_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, packed: Any) -> Any:
        self.reserve(packed.num_positions)
        return self._cos[: packed.num_tokens], self._sin[: packed.num_tokens]

    monkeypatch.setattr(lean._RotaryTable, "at", wrong)


@pytest.mark.parametrize(
    "plant", [norms_that_only_scale, turned_the_other_way, angles_of_the_place_in_the_forward]
)
def test_the_self_check_sees_a_planted_mistake(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    with pytest.raises(ModelError, match="lean forward; set 'forward: transformers'"):
        check_packed_forward(LanguageModel(tiny_model("llama"), "target", "lean"))


def test_the_family_is_recognised() -> None:
    lean_ones = {a for a in ARCHITECTURES if lean.why_not_lean(tiny_model(a)) is None}

    assert lean_ones == set(LEAN_ARCHITECTURES)


class _Strange(nn.Linear):
    """A layer that looks like a quantised or adapted one."""


def quantised(model: Any) -> None:
    model.model.layers[1].mlp.down_proj = _Strange(64, 32, bias=False)


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def mixed_dtypes(model: Any) -> None:
    model.lm_head.to(torch.bfloat16)


def growing_rope(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def another_activation(model: Any) -> None:
    model.config.hidden_act = "relu6"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantised, "_Strange stands where"),
        (hooked, "hooks"),
        (mixed_dtypes, "several dtypes"),
        (growing_rope, "rope type 'dynamic'"),
        (another_activation, "activation is relu6"),
    ],
)
def test_a_model_with_other_parts_runs_on_transformers_forward(change: Any, reason: str) -> None:
    model = tiny_model("llama")
    change(model)

    assert LanguageModel(model, "target").forward_kind == "transformers"
    with pytest.raises(ModelError, match=f"target: cannot run the lean forward.*{reason}"):
        LanguageModel(model, "target", "lean")


def test_joining_weights_on_the_cpu_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen2")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        hidden_states(LanguageModel(model, "target", "lean"))

        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_are_linear_layers_side_by_side(bias: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(6, n, bias=bias) for n in (4, 7)]
    product = products.Product(layers)
    x = torch.randn(rows, 6, generator=generator)
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], dim=-1)

        torch.testing.assert_close(product(x), expected)


def test_a_product_of_layers_with_and_without_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="biases"):
        products.Product([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
