"""Families with attention, biases or logits of their own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from paceline.errors import ModelError
from paceline.models import own_attention
from paceline.models.language_model import LanguageModel
from paceline.models.model_facts import cache_bytes_per_position
from paceline.models.output_head import OutputHead
from paceline.models.packing import Span
from paceline.models.self_checks import check_packed_forward
from paceline.testing.tiny_models import ARCHITECTURES, FAMILIES, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN = [
    name
    for name in FAMILIES
    if own_attention.OwnAttention(tiny_model(name).base_model)._replacements
]


def attentions(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if own_attention._family_of(module)]


def test_every_known_family_is_tested() -> None:
    tested = {type(module).__name__ for name in OWN for module in attentions(tiny_model(name))}

    assert tested == {name for _, name in own_attention._FAMILIES}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_bfloat16_is_as_near_as_it_can_be(architecture: str) -> None:
    check_packed_forward(LanguageModel(tiny_model(architecture).bfloat16(), "target"))


PAGED = [
    pytest.param(name, marks=[] if name in ("bloom", "gpt_neo") else pytest.mark.wide)
    for name in OWN
]


@pytest.mark.parametrize("architecture", PAGED)
def test_a_paged_cache_gives_the_same(architecture: str) -> None:
    pytest.importorskip("triton")
    check_packed_forward(LanguageModel(tiny_model(architecture), "target", paged=True))


@pytest.mark.parametrize("architecture", OWN)
def test_the_model_is_left_as_it_was(architecture: str) -> None:
    model = tiny_model(architecture)
    implementation = model.config._attn_implementation
    before = [set(module.__dict__) for module in model.modules()]
    inside = [dict(module._modules) for module in model.modules()]
    language_model = LanguageModel(model, "target")
    slot = language_model.acquire()

    with torch.inference_mode():
        language_model.unembed(language_model.forward(torch.arange(5), [Span(slot, 0, 5)]))
    with pytest.raises(IndexError):
        language_model.forward(torch.tensor([10**6]), [Span(slot, 5, 1)])

    assert [set(module.__dict__) for module in model.modules()] == before
    assert [dict(module._modules) for module in model.modules()] == inside
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("architecture", ["falcon", "bloom", "mpt", "xglm", "gptj"])
def test_hooks_around_an_attention_module_still_run(architecture: str) -> None:
    class Count(ModelHook):
        calls = 0

        def post_forward(self, module: torch.nn.Module, output: object) -> object:
            self.calls += 1
            return output

    model, hook = tiny_model(architecture), Count()
    for module in attentions(model):
        add_hook_to_module(module, hook)
    forwards = [module.__dict__["forward"] for module in attentions(model)]
    language_model = LanguageModel(model, "target")
    check_packed_forward(language_model)
    hook.calls = 0

    with torch.inference_mode():
        language_model.forward(torch.arange(5), [Span(language_model.acquire(), 0, 5)])

    assert hook.calls == len(attentions(model))
    assert [module.__dict__["forward"] for module in attentions(model)] == forwards


@pytest.mark.parametrize("architecture", ["bloom", "falcon_alibi"])
def test_biases_are_the_models_own_at_every_length(architecture: str) -> None:
    body = tiny_model(architecture).base_model
    bias = own_attention._BloomBias(body)
    build = bias._build
    for length in (3, 300, 5000):  # within the table, and past it
        ones = torch.ones(1, length, dtype=torch.int64)
        expected = build(ones, body.num_heads, dtype=torch.float32)[:, 0] / bias._divisor
        assert torch.equal(bias(torch.arange(length)), expected)
    assert bias._divisor == (math.sqrt(8) if architecture == "falcon_alibi" else 1)


def test_the_bias_of_mpt_is_its_own_at_every_length() -> None:
    body = tiny_model("mpt").base_model
    bias = own_attention._MptBias(body)
    for length in (3, 300, 5000):
        expected = body.build_mpt_alibi_tensor(body.num_heads, length)[:, 0]
        torch.testing.assert_close(bias(torch.arange(length)), expected, rtol=1e-6, atol=0)


def test_alibi_has_no_last_position() -> None:
    shape = {"vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    bloom = LanguageModel(BloomForCausalLM(BloomConfig(**shape)), "target")

    assert bloom.context_length > 10**6
    assert LanguageModel(tiny_model("bloom", context=64), "target").context_length == 64
    assert LanguageModel(tiny_model("mpt", context=64), "target").context_length == 64


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *FAMILIES])
def test_a_token_takes_the_bytes_that_the_cache_counts(architecture: str) -> None:
    model = LanguageModel(tiny_model(architecture), "target", "transformers")
    with torch.inference_mode():
        model.forward(torch.arange(3), [Span(model.acquire(), 0, 3)])
    storage = model.cache.layers
    positions = storage[0].shape[2]  # type: ignore[union-attr]

    expected = model.cache.num_bytes() // positions
    assert cache_bytes_per_position(model.model.config, model.dtype) == expected


# --- logits ---------------------------------------------------------------------------------------

SCALED = ["cohere", "cohere2", "granite", "granite_moe", "granite_moe_shared", "gemma2"]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *FAMILIES])
def test_only_heads_that_do_more_run_the_models_forward(architecture: str) -> None:
    model = tiny_model(architecture)
    head = OutputHead(model, "target")
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        expected = model(input_ids=ids).logits
        assert torch.equal(head(hidden), expected)
        assert head(hidden[0, 2]).shape == expected[0, 2].shape
        torch.testing.assert_close(head(hidden[0, 2]), expected[0, 2])

    is_plain = head._function is model.get_output_embeddings()
    assert is_plain == (architecture not in SCALED)


def test_a_cap_that_small_logits_do_not_show_is_found() -> None:
    model = tiny_model("gemma2", std=0.02).bfloat16()
    head = OutputHead(model, "target")
    with torch.inference_mode():
        head(torch.randn(1, 32, dtype=torch.bfloat16))

    assert head._function is not model.get_output_embeddings()


def test_hidden_states_are_as_wide_as_the_body_gives_them() -> None:
    config = OPTConfig(
        vocab_size=50, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, do_layer_norm_before=False,
    )  # fmt: skip
    model = LanguageModel(OPTForCausalLM(config).eval(), "target")
    with torch.inference_mode():
        hidden = model.forward(torch.arange(3), [Span(model.acquire(), 0, 3)])

    assert model.hidden_size == hidden.shape[1] == 16
    check_packed_forward(model)


def test_logits_follow_weights_that_change_in_place() -> None:
    model = tiny_model("cohere")
    language_model = LanguageModel(model, "target")
    hidden = torch.randn(3, 32)
    with torch.no_grad():
        before = language_model.unembed(hidden)
        model.lm_head.weight.mul_(2)
        torch.testing.assert_close(language_model.unembed(hidden), 2 * before)


def test_a_head_that_needs_its_body_is_refused() -> None:
    class Own(type(tiny_model("cohere"))):  # type: ignore[misc]
        def forward(self, **given: object) -> object:
            return super().forward(input_ids=torch.zeros(1, 1, dtype=torch.int64), wrong=self.gone)

    model = tiny_model("cohere")
    model.__class__ = Own

    with pytest.raises(ModelError, match="target: Own does not make logits of hidden states alone"):
        OutputHead(model, "target")(torch.randn(1, 32))
