"""The self-check of skipped sub-layers: to skip them is to add nothing to the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.errors import ModelError
from paceline.models.encoder_decoder import body_of, inputs_of_body
from paceline.models.packing import Span
from paceline.models.self_checks.bounds import past_windows
from paceline.models.sublayers import LayerSubset, SubLayers
from paceline.models.visibility import FAILURES

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.language_model import LanguageModel

_SOURCE: Final = 7  # tokens


def check_sublayers(language_model: LanguageModel, seed: int = 0) -> None:
    """Check the effect of skipped sub-layers on random tokens. Raises ModelError if it is wrong.

    With nothing skipped the hidden states must be the model's own; with everything skipped, those of
    the same model without decoder layers: embedding, last norm.
    """
    name, kind = language_model.name, type(language_model.model).__name__
    generator = torch.Generator().manual_seed(seed)
    length = past_windows(language_model, 7, 0)
    tokens = torch.randint(language_model.num_logits, (length,), generator=generator)

    encoder = language_model.encoder
    source = None if encoder is None else encoder.random_source(_SOURCE, generator)

    def run(subset: LayerSubset | None) -> Tensor:
        cache = language_model.cache.for_checks()
        slot = cache.acquire()
        if source is not None:
            language_model.begin(slot, source, cache)
        try:
            span = Span(slot, 0, length, prefill=True)
            return language_model.forward(tokens, [span], cache=cache, skip=subset)
        finally:
            cache.release(slot)

    with torch.inference_mode():
        try:
            whole, none_skipped = run(None), run(LayerSubset())
            all_skipped = run(LayerSubset.everything(language_model.num_layers))
        except FAILURES as error:
            raise ModelError(
                f"{name}: the sub-layers of {kind} cannot be skipped ({error})"
            ) from error
        bare = _without_layers(language_model, tokens)
    tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.05
    for found, expected in ((none_skipped, whole), (all_skipped, bare)):
        difference = (found.float() - expected.float()).abs().max()
        if not difference <= tolerance * expected.float().std():
            raise ModelError(
                f"{name}: the sub-layers of {kind} cannot be skipped: without them the hidden state "
                f"is off by {difference:.2g}, so its layers do more than add to the residual stream"
            )


def _without_layers(language_model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return hidden states [N, D] of transformers' own code without decoder layers."""
    body = body_of(language_model.model)
    sublayers = SubLayers(body, language_model.num_layers, language_model.name)
    with sublayers.no_layers():
        ids = tokens[None].to(language_model.device)
        output: Any = body(input_ids=ids, use_cache=False, **inputs_of_body(language_model.model))
    hidden: Tensor = output.last_hidden_state
    return hidden[0]
