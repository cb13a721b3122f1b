"""The prompts of a call of transformers' `generate`: rows of a batch, without their padding.

Of a model with an encoder they are its sources, and the batch holds the first tokens of the decoder.
Symbols: B rows, L padded prompt length, S padded source length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from transformers import Cache

from paceline.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# inputs of the model's forward that a caller may give, in addition to an empty cache of any name
_INPUTS: Final = frozenset(
    {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
)


class Prompt(NamedTuple):
    """A row's prompt, and the padding [num_pad] to the left of its text in the batch."""

    tokens: list[int]
    padding: Tensor


def read_prompts(
    input_ids: Tensor,
    model_kwargs: Mapping[str, Any],
    given: Mapping[str, Any],
    sources: Tensor | None = None,
    start: int | None = None,
) -> list[Prompt]:
    """Return the prompt of each row.

    input_ids: [B, L]. model_kwargs: prepared by transformers. given: the caller's own. sources: [B, S]
    what an encoder reads. start: the first token of a decoder's text, None without an encoder. Raises
    RequestError for inputs other than text, padding on the usual side and an empty cache.
    """
    _refuse_inputs(given)
    if start is not None:
        return _read_sources(input_ids, sources, start, model_kwargs)
    length = input_ids.shape[1]
    mask = _mask_of(input_ids, model_kwargs)
    if (mask[:, 1:] < mask[:, :-1]).any() or not mask[:, -1].all():
        raise RequestError(
            "attention_mask hides tokens that are not padding on the left; tokenize with "
            "padding_side='left'"
        )
    positions = model_kwargs.get("position_ids")
    usual = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    if positions is not None and ((positions - usual) * mask).any():
        raise RequestError(
            "paceline counts positions from each row's first token; remove position_ids"
        )
    padding: list[int] = (length - mask.sum(dim=-1)).tolist()
    return [Prompt(ids[n:].tolist(), ids[:n]) for ids, n in zip(input_ids, padding, strict=True)]


def _read_sources(
    input_ids: Tensor, sources: Tensor | None, start: int, model_kwargs: Mapping[str, Any]
) -> list[Prompt]:
    """Return the source of each row, without the padding to its right. input_ids: [B, 1]."""
    if sources is None or sources.ndim != 2 or sources.is_floating_point():
        raise RequestError("paceline reads a source of token ids; give input_ids")
    if input_ids.shape[1] != 1 or not (input_ids == start).all():
        raise RequestError(
            f"paceline begins a decoder's text with the token {start} alone; remove decoder_input_ids "
            "and decoder_start_token_id"
        )
    mask = _mask_of(sources, model_kwargs)
    if (mask[:, 1:] > mask[:, :-1]).any() or not mask[:, 0].all():
        raise RequestError(
            "attention_mask hides tokens of a source that are not padding on the right; tokenize with "
            "padding_side='right'"
        )
    lengths: list[int] = mask.sum(dim=-1).tolist()
    return [
        Prompt(row[:n].tolist(), ids[:0])
        for row, n, ids in zip(sources, lengths, input_ids, strict=True)
    ]


def _refuse_inputs(given: Mapping[str, Any]) -> None:
    """Raise RequestError for an input other than text and an empty cache."""
    for name, value in given.items():
        if isinstance(value, Cache) and not value.get_seq_length():
            continue
        if isinstance(value, Cache):
            raise RequestError(
                f"'{name}' already holds text; paceline has its own cache, which shares equal "
                "beginnings of prompts, so give the whole prompt as input_ids"
            )
        if name not in _INPUTS and value is not None:
            raise RequestError(
                f"paceline does not support the model input '{name}'; give input_ids and "
                "attention_mask only"
            )


def _mask_of(ids: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
    """Return [B, L] int64, 0 for the padding of ids [B, L]."""
    mask = model_kwargs.get("attention_mask")
    return (torch.ones_like(ids) if mask is None else mask != 0).long()
