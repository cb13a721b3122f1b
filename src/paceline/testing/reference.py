"""What transformers itself writes: the text that every drafter must reproduce.

Greedy decoding by the model's own `generate`, with how close the call was: where the two largest
logits are nearer than float32 sums in another order can tell apart, either token is right.
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
    """Greedy tokens, and the smallest gap between the two largest logits on the way."""

    tokens: list[int]
    margin: float


def greedy_reference(
    model: PreTrainedModel,
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    stop_token_ids: Sequence[int] = (),
) -> Reference:
    """`model.generate(do_sample=False)` of one prompt. Ends only at the stop tokens given here.

    At most as many tokens as the context allows: the last one is never fed.
    """
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
            max_new_tokens=min(max_new_tokens, context + 1 - len(prompt_tokens)),
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        settings.eos_token_id = own_stop
    best = torch.cat(output.logits).float().topk(2).values
    tokens = output.sequences[0, len(prompt_tokens) :].tolist()
    return Reference(tokens, float((best[:, 0] - best[:, 1]).min()))
