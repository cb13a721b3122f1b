"""Every architecture that the compiled forward reads gives transformers' logits and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import paceline
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.models.compiled import family
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.self_checks import check_packed_forward
from paceline.testing.tiny_models import COMPILED_ARCHITECTURES, tiny_model
from paceline.testing.tokenizers import NUM_TOKENS, byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_TOKENS_FED = 24  # less than the shortest context
every_architecture = pytest.mark.parametrize("architecture", COMPILED_ARCHITECTURES)


def uneven(architecture: str, **settings: Any) -> PreTrainedModel:
    """Return a tiny model whose norms and biases are all different numbers."""
    model = tiny_model(architecture, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def random_tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(NUM_TOKENS, (n,), generator=torch.Generator().manual_seed(seed))


def packed_logits(model: PreTrainedModel, tokens: torch.Tensor, forward: str) -> torch.Tensor:
    """Return logits [N, V] of a text that is fed in two pieces."""
    ours = LanguageModel(model, architecture_of(model), forward)  # type: ignore[arg-type]
    slot, half = ours.acquire(), len(tokens) // 2
    with torch.inference_mode():
        parts = [
            ours.forward(tokens[:half], [Span(slot, 0, half)]),
            ours.forward(tokens[half:], [Span(slot, half, len(tokens) - half)]),
        ]
        return ours.unembed(torch.cat(parts)).float()


def architecture_of(model: PreTrainedModel) -> str:
    return type(model).__name__


def test_every_reader_has_a_tiny_model() -> None:
    # those of T5 are tested in `test_t5_values.py`
    names = (*COMPILED_ARCHITECTURES, "t5", "mt5", "umt5")
    tested = {architecture_of(tiny_model(name)) for name in names}

    # the text part of the second is the first
    assert tested | {"Gemma3ForConditionalGeneration"} == set(family._READERS)


@every_architecture
def test_logits_are_those_of_transformers(architecture: str) -> None:
    model = uneven(architecture)
    tokens = random_tokens(NUM_TOKENS_FED)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]

    got = packed_logits(model, tokens, "auto")

    assert (got - expected).abs().max() < 1e-3 * expected.std()
    ours = LanguageModel(model, architecture)
    assert (ours.forward_kind, ours.why_not_compiled) == ("compiled", None)
    check_packed_forward(ours)


@every_architecture
def test_greedy_text_with_a_drafter_is_that_of_generate(architecture: str) -> None:
    model = uneven(architecture)
    prompt = random_tokens(6, seed=2).tolist() * 2
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole: Any = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )
    drafter = PromptLookup("lookup", PromptLookupSettings(min_ngram=1))
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={"lookup": drafter})

    done = pace.generate([prompt], drafter="lookup", max_new_tokens=16, ignore_eos=True)

    assert pace.parts.target.forward_kind == "compiled"
    assert done[0].token_ids == whole[0, len(prompt) :].tolist()


@every_architecture
def test_in_bfloat16_the_error_is_at_most_that_of_transformers(architecture: str) -> None:
    """Both are compared with float32 arithmetic on the rounded weights."""
    errors = {"auto": 0.0, "transformers": 0.0}
    for seed in range(3):
        model = uneven(architecture, seed=seed)
        model.bfloat16()
        tokens = random_tokens(NUM_TOKENS_FED, seed)
        rounded = {kind: packed_logits(model, tokens, kind) for kind in errors}
        with torch.inference_mode():
            model.float()  # type: ignore[no-untyped-call]
            exact = model(tokens[None]).logits[0]
        for kind, logits in rounded.items():
            errors[kind] += float((logits - exact).square().mean())

    assert errors["auto"] ** 0.5 <= 1.1 * errors["transformers"] ** 0.5


def gated(architecture: str = "llama", **settings: Any) -> PreTrainedModel:
    return tiny_model(architecture, **settings)


def in_float16() -> PreTrainedModel:
    model: Any = gated("olmo2")
    return model.half()  # type: ignore[no-any-return]


def with_hook() -> PreTrainedModel:
    model: Any = gated()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model  # type: ignore[no-any-return]


def with_odd_linear(architecture: str, name: str) -> PreTrainedModel:
    class Odd(nn.Linear):
        """A linear layer of another type."""

    model: Any = gated(architecture)
    attention = model.model.layers[1].self_attn
    linear = getattr(attention, name)
    setattr(attention, name, Odd(linear.in_features, linear.out_features, bias=False))
    return model  # type: ignore[no-any-return]


def with_dynamic_rope() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    by_type = {"sliding_attention": {"rope_type": "default"}, "full_attention": rope}
    return gated("gemma3", rope_parameters=by_type)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: gated("gpt2"), "compiled code does not know GPT2LMHeadModel"),
        (lambda: gated("llama", hidden_act="relu6"), "its activation is relu6"),
        (lambda: gated("gemma2", hidden_activation="relu6"), "its activation is relu6"),
        (
            lambda: gated("gemma3", use_bidirectional_attention=True),
            "its attention sees later tokens",
        ),
        (with_dynamic_rope, "its rope type 'dynamic' depends on the length of the text"),
        (with_hook, "its modules have hooks"),
        (
            lambda: with_odd_linear("phi3", "qkv_proj"),
            "Odd stands where a plain linear layer should",
        ),
        (in_float16, "its weights are float16"),
    ],
)
def test_variants_that_do_not_fit_are_refused_by_name(model: Any, reason: str) -> None:
    assert family.why_not_compiled(model()) == reason
