"""Models of a shape: built on the meta device and run through the project's forward, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from paceline.errors import ConfigError
from paceline.models.encoder_decoder import auto_class_of
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.models.sublayers import LayerSubset

_TOLERANCE: Final = 0.05  # of the size in a model's name, which is rounded


def model_of_shape(
    name: str, shape: Mapping[str, Any], dtype: torch.dtype, millions: float | None = None
) -> LanguageModel:
    """Return a model without weights. Raises ConfigError if the shape is not that of a language model.

    millions: its size, within the rounding of a name.
    """
    kind = shape.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"'{name}': its shape names no model_type, such as llama")
    try:
        blank = AutoConfig.for_model(kind)
        strange = [key for key in shape if not hasattr(blank, key)]
        if strange:
            raise ConfigError(f"'{name}': a {kind} has no '{strange[0]}' in its configuration")
        config = AutoConfig.for_model(**shape)
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0  # any, for no text is written
        with torch.device("meta"):
            model = auto_class_of(config).from_config(config, dtype=dtype)
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ConfigError(
            f"'{name}': not the shape of a language model ({reason[:200]})"
        ) from error
    found = LanguageModel(model, name, forward="transformers", paged=False)
    size = num_parameters(found) / 1e6
    if millions is not None and abs(size / millions - 1) > _TOLERANCE:
        raise ConfigError(
            f"'{name}': its shape has {size:,.0f} million parameters, the recipe says {millions:,.0f}"
        )
    return found


def num_parameters(model: LanguageModel) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.model.parameters()}.values())


def num_multiplied(model: LanguageModel) -> int:
    """Return the number of parameters in products over the text: all but an encoder's, and an embedding
    that is only looked up.
    """
    embedding: Any = model.model.get_input_embeddings()
    head: Any = model.model.get_output_embeddings()
    looked_up = 0 if head.weight is embedding.weight else embedding.weight.numel()
    return num_parameters(model) - int(looked_up) - num_of_encoder(model)


def num_of_encoder(model: LanguageModel) -> int:
    """Return the number of an encoder's parameters in products, 0 without one."""
    if model.encoder is None:
        return 0
    embedding: Any = model.model.get_input_embeddings()
    encoder: Any = model.model.get_encoder()
    return sum(p.numel() for p in encoder.parameters() if p is not embedding.weight)


def check_forward(model: LanguageModel, num_verified: int, skip: LayerSubset | None = None) -> None:
    """Prefill and verify a few tokens without weights. Raises ConfigError if the shapes do not fit."""
    slot = model.cache.acquire()
    try:
        with torch.inference_mode():
            if model.encoder is not None:
                generator = torch.Generator().manual_seed(0)
                model.begin(slot, model.encoder.random_source(4, generator))
            for start, width in ((0, 4), (4, num_verified)):
                tokens = torch.zeros(width, dtype=torch.int64, device="meta")
                hidden = model.forward(tokens, [Span(slot, start, width)], skip=skip)
                logits = model.unembed(hidden)
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"'{model.name}': its shape cannot run a forward ({error})") from error
    finally:
        model.release(slot)
    if tuple(logits.shape) != (num_verified, model.num_logits):
        raise ConfigError(f"'{model.name}': a forward gives {tuple(logits.shape)} logits")
