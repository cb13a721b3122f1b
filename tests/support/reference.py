"""The greedy text of transformers' own `generate`, which every drafter must reproduce.

It has a margin: where the two largest logits differ by less than float32 sums in another order, either
token is correct.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.models.model_facts import context_length_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy tokens, and the smallest gap between the two largest logits at any of them."""

    tokens: list[int]
    margin: float


def greedy_reference(
    model: PreTrainedModel,
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    stop_token_ids: Sequence[int] = (),
) -> Reference:
    """Return the greedy text of one prompt, which only the given stop tokens and the limits end.

    It has at most the tokens that the context allows; the last one is not an input. An encoder reads the
    prompt if the model has one.
    """
    before = 1 if model.config.is_encoder_decoder else len(prompt_tokens)
    context, _ = context_length_of(model.config.get_text_config())
    generate: Any = model.generate
    settings: Any = model.generation_config
    own_stop, settings.eos_token_id = settings.eos_token_id, list(stop_token_ids) or None
    try:
        output = generate(
            torch.tensor([list(prompt_tokens)], device=model.device),
            attention_mask=torch.ones(
                1, len(prompt_tokens), dtype=torch.int64, device=model.device
            ),
            do_sample=False,
            max_new_tokens=min(max_new_tokens, context + 1 - before),
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        settings.eos_token_id = own_stop
    best = torch.cat(output.logits).float().topk(2).values
    tokens = output.sequences[0, before:].tolist()
    return Reference(tokens, float((best[:, 0] - best[:, 1]).min()))
