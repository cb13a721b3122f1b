"""Random models of the T5 family, their sources and texts, for the tests of the compiled forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.testing.tiny_models import tiny_model
from support.compiled_models import NUM_IDS, random_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.models.forward_choice import ForwardChoice, Weights
    from paceline.models.sublayers import LayerSubset

T5_SHAPES: dict[str, dict[str, Any]] = {
    "t5": {},  # a plain ReLU, a tied head, scaled logits
    "mt5": {"architecture": "mt5"},  # a gated GELU, a head of its own
    "umt5": {"architecture": "umt5"},  # a bias per layer
    "gated_relu": {"architecture": "umt5", "feed_forward_proj": "gated-relu", "d_ff": 72},
    "plain_gelu": {"feed_forward_proj": "gelu", "d_ff": 33},
    "not_scaled": {"tie_word_embeddings": False, "d_ff": 200},
    "head_20": {"d_model": 100, "d_kv": 20, "num_heads": 3},
    "head_64": {"architecture": "mt5", "d_model": 128, "d_kv": 64, "num_heads": 2, "d_ff": 256},
    "few_distances": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 64},
}


def random_t5(dtype: str = "float32", architecture: str = "t5", **settings: Any) -> Any:
    """Return a model with activations around 1 and biases of about the size of its scores."""
    std = 1.4 * settings.get("d_model", 32) ** -0.5
    layers = {"num_decoder_layers": 3}
    model: Any = tiny_model(architecture, vocab_size=NUM_IDS, std=std, **layers, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            elif name.endswith("relative_attention_bias.weight"):
                parameter.normal_(generator=generator)
            elif name.endswith("Attention.q.weight"):
                parameter.mul_(model.config.d_kv**-0.5)  # T5 does not scale scores
    return model.to(getattr(torch, dtype))


def load_t5(
    model: Any, forward: ForwardChoice = "compiled", weights: Weights = "own"
) -> LanguageModel:
    return LanguageModel(model, "target", forward, weights=weights)


def random_source(length: int, seed: int = 0) -> list[int]:
    return random_text(length, 1000 + seed)


def begin(model: LanguageModel, source: Sequence[int]) -> int:
    """Return the slot of a new row that has read a source."""
    slot = model.acquire()
    with torch.inference_mode():
        model.begin(slot, source)
    return slot


def feed(
    model: LanguageModel,
    pieces: dict[int, tuple[int, list[int]]],
    trees: dict[int, list[int]] | None = None,
    skip: LayerSubset | None = None,
) -> dict[int, torch.Tensor]:
    """Return the hidden states by slot. pieces: by slot (start, tokens). trees: parents by slot."""
    spans = [Span(slot, start, len(tokens)) for slot, (start, tokens) in pieces.items()]
    flat = torch.tensor([token for _, tokens in pieces.values() for token in tokens])
    parents = [(trees or {}).get(slot) for slot in pieces]
    with torch.inference_mode():
        hidden = model.forward(flat, spans, parents, skip=skip)
    return dict(zip(pieces, hidden.split([span.width for span in spans]), strict=True))


def hidden_alone(model: LanguageModel, source: Sequence[int], text: list[int]) -> torch.Tensor:
    """Return the hidden states of a text that is computed alone and at once."""
    slot = begin(model, source)
    hidden = feed(model, {slot: (0, text)})[slot]
    model.release(slot)
    return hidden
