"""The self-check of exact mode: the bits of logits do not depend on drafts, trees or other rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.errors import ModelError
from paceline.models.packing import PREFILL_BLOCK, Span
from paceline.models.self_checks.bounds import past_windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.language_model import LanguageModel


def check_exact(language_model: LanguageModel, seed: int = 0) -> None:
    """Compare the bits of one row decoded alone, in drafts, in trees, and among other rows.

    Raises ModelError at the first difference: then exact mode is impossible on this machine.
    """
    generator = torch.Generator().manual_seed(seed)
    length = past_windows(language_model, PREFILL_BLOCK + 2, 14)
    prompt, other = (
        torch.randint(language_model.num_logits, (n,), generator=generator) for n in (length, 7)
    )
    text = torch.randint(language_model.num_logits, (12,), generator=generator)
    with torch.inference_mode():
        alone = _decode(language_model, prompt, text, [1] * 12, None)
        for widths in ([5, 4, 3], [1, 2, 9], [12]):
            for neighbour in (None, other):
                drafted = _decode(language_model, prompt, text, widths, neighbour)
                if not torch.equal(alone, drafted):
                    raise _differs(language_model, f"drafts of {widths} tokens")
        if not torch.equal(alone, _decode_tree(language_model, prompt, text)):
            raise _differs(language_model, "a tree")


def _differs(language_model: LanguageModel, what: str) -> ModelError:
    return ModelError(
        f"{language_model.name}: exact mode cannot be had on this machine: the logits after {what} "
        f"differ in their last bits from those of plain decoding in {language_model.dtype}; leave "
        "exact mode off, or use float32"
    )


def _decode(
    model: LanguageModel,
    prompt: Tensor,
    text: Tensor,
    widths: Sequence[int],
    neighbour: Tensor | None,
) -> Tensor:
    """Return the logits after each token of `text`, fed `widths` at a time.

    neighbour: the prompt of another row in every forward.
    """
    cache = model.cache.for_checks()
    row, other_row = cache.acquire(), cache.acquire()
    tokens, spans = prompt, [Span(row, 0, len(prompt), prefill=True)]
    if neighbour is not None:
        tokens = torch.cat([neighbour, prompt])
        spans.insert(0, Span(other_row, 0, len(neighbour), prefill=True))
    model.forward(tokens, spans, cache=cache)
    logits, at = [], 0
    for width in widths:
        tokens, spans = text[at : at + width], [Span(row, len(prompt) + at, width)]
        if neighbour is not None:
            tokens = torch.cat([text[:1], tokens])
            spans.insert(0, Span(other_row, len(neighbour) + at, 1))
        hidden = model.forward(tokens, spans, cache=cache)
        logits.append(model.unembed(hidden[-width:]))
        at += width
    return torch.cat(logits)


def _decode_tree(model: LanguageModel, prompt: Tensor, text: Tensor) -> Tensor:
    """Return the logits of `_decode` from trees of five nodes, two of them wrong."""
    cache = model.cache.for_checks()
    row = cache.acquire()
    model.forward(prompt, [Span(row, 0, len(prompt), prefill=True)], cache=cache)
    # of the wrong child, the right child, the wrong grandchild and the right grandchild
    parents = [-1, -1, 1, 1]
    logits = []
    for at in range(0, len(text), 3):
        right = text[at : at + 3]
        nodes = right[[0, 0, 1, 0, 2]]
        start = len(prompt) + at
        hidden = model.forward(nodes, [Span(row, start, 5)], [parents], cache=cache)
        logits.append(model.unembed(hidden)[[0, 2, 4]])
        cache.copy_positions(row, [start, start + 2, start + 4], start)
    return torch.cat(logits)
