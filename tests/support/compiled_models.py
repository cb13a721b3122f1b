"""Random models and texts for the tests of the compiled forward."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from paceline.models.compiled.forward import CompiledForward
from paceline.models.packing import Span
from paceline.models.visibility import look_at
from paceline.testing.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from paceline.models.compiled.cache import PackedRows

NUM_IDS = 97  # no multiple of 16


def random_model(
    dtype: str = "float32", architecture: str = "llama", **settings: Any
) -> PreTrainedModel:
    """Return a model whose norms and biases are random too.

    Its weights are small enough for activations around 1 at every hidden size.
    """
    hidden_size = settings.get("hidden_size", 32)
    settings = {"vocab_size": NUM_IDS, "context": 1024, "std": 1.4 * hidden_size**-0.5} | settings
    model = tiny_model(architecture, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.to(getattr(torch, dtype))  # type: ignore[arg-type]


def compile_model(model: PreTrainedModel) -> CompiledForward:
    """Return the compiled forward of a model."""
    context = model.config.max_position_embeddings
    windows = look_at(model, context, torch.device("cpu")).windows
    return CompiledForward(model, windows, context)


def random_text(length: int, seed: int = 0, num_ids: int = NUM_IDS) -> list[int]:
    """Return random ids."""
    source = random.Random(seed)
    return [source.randrange(num_ids) for _ in range(length)]


def random_tree(width: int, seed: int) -> list[int]:
    """Return the parents of a random tree's tokens after the root, -1 for the root."""
    source = random.Random(seed)
    return [source.randrange(max(-1, k - 9), k) for k in range(width - 1)]


def path_to(parents: Sequence[int], place: int) -> list[int]:
    """Return the places from a tree's root to one of its tokens."""
    path = [place]
    while path[0] > 0:
        path.insert(0, parents[path[0] - 1] + 1)
    return path


def prefill(forward: CompiledForward, cache: PackedRows, text: Sequence[int]) -> int:
    """Cache a text in a new row, and return its slot."""
    slot = cache.acquire()
    if text:
        forward.hidden(text, [Span(slot, 0, len(text))], None, cache)
    return slot


def hidden_of(forward: CompiledForward, text: Sequence[int]) -> torch.Tensor:
    """Return the hidden states of a text that is computed alone and at once."""
    cache = forward.new_cache()
    return forward.hidden(text, [Span(cache.acquire(), 0, len(text))], None, cache)
