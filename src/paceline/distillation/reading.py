"""How a model reads a batch of texts, whichever has the batch: the target or a student.

A causal model reads prompt and answer as one text. An encoder-decoder reads the prompt by its encoder
and the answer by its decoder, after one start token; so it has a distribution at every token of the
answer and at none of the prompt. A batch is the same for both, and each learned position is found in
either. Symbols: B texts, T their padded length, S padded sources, W padded decoder texts, n learned
positions, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from paceline.errors import ConfigError
from paceline.models.encoder_decoder import is_encoder_decoder, start_token
from paceline.models.model_facts import context_length_of
from paceline.models.output_head import OutputHead

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.distillation.batches import Batch, Example
    from paceline.distillation.settings import AnySettings
    from paceline.models.language_model import LanguageModel

LONGEST: Final = 4096
"""Tokens of a source or of an answer, of a model whose positions have no last one (T5)."""


class SourceBatch(NamedTuple):
    """A batch as an encoder-decoder reads it."""

    sources: Tensor  # [B, S] int64, padded on the right
    is_source: Tensor  # [B, S] bool
    tokens: Tensor  # [B, W] int64: the start token and the answer without its last token
    places: Tensor  # [n] int64, the learned positions among the B * W


def with_sources(batch: Batch, start: int) -> SourceBatch:
    """Return a batch as an encoder-decoder reads it. start: the first token of the decoder's text.

    Raises ValueError if a token of a prompt is learned.
    """
    num_prompt = batch.num_prompt
    num_inputs = batch.tokens.shape[1]
    owners, columns = batch.places // num_inputs, batch.places % num_inputs
    own = columns - (num_prompt[owners] - 1)
    if len(own) and int(own.min()) < 0:
        raise ValueError("an encoder-decoder has no distribution of a prompt's tokens")
    width = int(own.max()) + 1 if len(own) else 1
    num_source = int(num_prompt.max())
    is_source = torch.arange(num_source, device=num_prompt.device) < num_prompt[:, None]
    sources = batch.tokens[:, :num_source].masked_fill(~is_source, 0)
    # the decoder's token at place j > 0 is the answer's token j - 1, at num_prompt + j - 1
    at = num_prompt[:, None] - 1 + torch.arange(width, device=num_prompt.device)
    tokens = batch.tokens.gather(1, at.clamp(max=num_inputs - 1))
    tokens[:, 0] = start
    return SourceBatch(sources, is_source, tokens, owners * width + own)


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return a model's final hidden states [n, D] at the batch's learned positions."""
    batch = batch.to(model.device)
    if not is_encoder_decoder(model):
        states = model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        return states.flatten(0, 1)[batch.places]
    read = with_sources(batch, start_token(model, type(model).__name__))
    mask = read.is_source.long()
    encoder: Any = model.get_encoder()
    decoder: Any = model.get_decoder()
    source = encoder(input_ids=read.sources, attention_mask=mask).last_hidden_state
    states = decoder(
        input_ids=read.tokens,
        encoder_hidden_states=source,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    picked: Tensor = states.flatten(0, 1)[read.places]
    return picked


def output_scale(model: PreTrainedModel) -> float:
    """Return the factor of a model's hidden states before its output layer: T5's D^-0.5, or 1."""
    if not is_encoder_decoder(model):
        return 1.0
    head: Any = model.get_output_embeddings().weight
    probe = torch.randn(1, 1, head.shape[1], generator=torch.Generator().manual_seed(0)).to(head)
    with torch.inference_mode():
        found, own = OutputHead(model, type(model).__name__)(probe), probe @ head.T
    scaled = head.shape[1] ** -0.5
    return min((1.0, scaled), key=lambda scale: float((found - own * scale).abs().sum()))


def longest_text(model: PreTrainedModel) -> int:
    """Return the tokens of prompt and answer together that a model surely reads."""
    limit = context_length_of(model.config.get_text_config())[0]
    return min(limit, LONGEST) if is_encoder_decoder(model) else limit


def fits(model: PreTrainedModel, example: Example) -> bool:
    """Return whether a model can read a text, whose last token is no input."""
    limit = longest_text(model)
    if is_encoder_decoder(model):
        return 0 < example.num_prompt <= limit and example.num_output <= limit
    return len(example.tokens) - 1 <= limit


def check_target(target: LanguageModel) -> None:
    """Raise ConfigError for a target whose sources are no text: prompt files hold none for it."""
    if target.encoder is not None and target.encoder.reads_features:
        raise ConfigError(
            f"{target.name}: {type(target.model).__name__} reads features such as sound, and prompt "
            "files hold text; drafters for it cannot be trained yet"
        )


def with_prompt_weight(settings: AnySettings, *models: PreTrainedModel | None) -> AnySettings:
    """Return the settings of a training of these models: an encoder-decoder learns no prompts.

    Raises ConfigError if the settings ask for it.
    """
    if not any(model is not None and is_encoder_decoder(model) for model in models):
        return settings
    if settings.prompt_weight and "prompt_weight" in settings.model_fields_set:
        raise ConfigError(
            f"prompt_weight {settings.prompt_weight:g}: an encoder reads the prompts, so there is no "
            "distribution of their tokens to learn; remove it"
        )
    return settings.model_copy(update={"prompt_weight": 0.0})
