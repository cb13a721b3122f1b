"""Skipped sub-layers mean the same in both forwards, and the model is not changed."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from paceline.errors import ModelError
from paceline.models import sublayers
from paceline.models.forward_choice import ForwardChoice
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.self_checks import check_sublayers
from paceline.models.sublayers import LayerSubset
from paceline.testing.tiny_models import (
    ARCHITECTURES,
    FAMILIES,
    LEAN_ARCHITECTURES,
    WITHOUT_SUBSETS,
    tiny_model,
)

TEXT = torch.arange(3, 12)
SUBSETS = [
    LayerSubset(attention=frozenset({0})),
    LayerSubset(frozenset({1}), frozenset({0})),
    LayerSubset(mlp=frozenset({0, 1})),
]


def hidden(model: LanguageModel, subset: LayerSubset | None) -> torch.Tensor:
    cache = model.cache.for_checks()
    with torch.inference_mode():
        return model.forward(TEXT, [Span(cache.acquire(), 0, len(TEXT))], cache=cache, skip=subset)


@pytest.mark.parametrize("architecture", [name for name in FAMILIES if name not in WITHOUT_SUBSETS])
def test_every_family_can_leave_out_its_sublayers(architecture: str) -> None:
    check_sublayers(LanguageModel(tiny_model(architecture), "tiny"))


@pytest.mark.parametrize("architecture", WITHOUT_SUBSETS)
def test_families_whose_sublayers_cannot_be_left_out_are_refused(architecture: str) -> None:
    with pytest.raises(ModelError, match="cannot be skipped"):
        check_sublayers(LanguageModel(tiny_model(architecture), "tiny"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("forward", ["auto", "transformers"])
def test_every_architecture_can_leave_out_its_sublayers(
    architecture: str, forward: ForwardChoice
) -> None:
    check_sublayers(LanguageModel(tiny_model(architecture), "tiny", forward))


@pytest.mark.parametrize("architecture", LEAN_ARCHITECTURES)
@pytest.mark.parametrize("forward", ["compiled", "lean"])
def test_all_forwards_leave_out_the_same(architecture: str, forward: ForwardChoice) -> None:
    model = tiny_model(architecture)
    own = LanguageModel(model, "own", forward)
    general = LanguageModel(model, "general", "transformers")
    for subset in SUBSETS:
        torch.testing.assert_close(
            hidden(own, subset), hidden(general, subset), atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(hidden(own, subset), hidden(own, None), atol=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "opt", "gemma2"])
def test_leaving_out_is_zeroing_what_the_sublayer_adds(architecture: str) -> None:
    """Compare with weights of zero in transformers' own forward."""
    model, zeroed = tiny_model(architecture), tiny_model(architecture)
    ends = ("o_proj", "c_proj", "dense", "out_proj", "down_proj", "fc2")
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            if name.split(".")[-2] in ends and (".1." in name):
                parameter.zero_()
        expected = zeroed.base_model(TEXT[None]).last_hidden_state[0]
    both = LayerSubset(frozenset({1}), frozenset({1}))
    found = hidden(LanguageModel(model, "tiny", "transformers"), both)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_cache_of_a_skipped_attention_is_not_touched() -> None:
    for forward in ("compiled", "lean", "transformers"):
        model = LanguageModel(tiny_model(), "tiny", forward)  # type: ignore[arg-type]
        slot = model.acquire()
        with torch.inference_mode():
            model.forward(TEXT, [Span(slot, 0, len(TEXT))])
            before = model.cache.read(slot, 0, len(TEXT))
            subset = LayerSubset(attention=frozenset({1}))
            model.forward(TEXT + 1, [Span(slot, 0, len(TEXT))], skip=subset)
            after = model.cache.read(slot, 0, len(TEXT))
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


def test_the_model_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    assert isinstance(model, GPT2LMHeadModel)
    block = model.transformer.h[0]
    own = block.mlp.forward
    block.mlp.forward = own  # someone else's wrapper in its place, as some libraries put there
    before = [dict(module.__dict__) for module in model.modules()]
    language_model = LanguageModel(model, "tiny")
    everything = LayerSubset.everything(2)

    hidden(language_model, everything)
    check_sublayers(language_model)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("in the middle of a forward")

    monkeypatch.setattr(model.transformer.ln_f, "forward", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        hidden(language_model, everything)
    monkeypatch.undo()

    assert [dict(module.__dict__) for module in model.modules()] == before
    assert block.mlp.forward is own


def post_norm_opt() -> OPTForCausalLM:
    """Norms after the addition, as in OPT-350m, change the residual stream itself."""
    none = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        **none,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OPTForCausalLM(config).eval()


def test_post_norm_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="sub-layers of OPTForCausalLM cannot be skipped"):
        check_sublayers(LanguageModel(post_norm_opt(), "opt"))


def test_unknown_names_are_refused() -> None:
    model = tiny_model("phi")
    for layer in model.base_model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    with pytest.raises(ModelError, match="no attention found in PhiDecoderLayer"):
        hidden(LanguageModel(model, "odd"), LayerSubset())


def test_a_sublayer_that_is_not_silent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sublayers, "_silence", lambda x, *args, **kwargs: x.flip(-1))
    with pytest.raises(ModelError, match="cannot be skipped"):
        check_sublayers(LanguageModel(tiny_model("gpt2"), "tiny"))
