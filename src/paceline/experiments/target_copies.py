"""Drafters made from the target without training: a copy in int8, and copies without inner layers.

As draft models they have caches and texts of their own, which `layer_skip` has not, so they fit the
`alignment` reward. Each has the target's vocabulary and a known share of its layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.config import DrafterSection
from paceline.errors import ConfigError
from paceline.models.loading import quiet_transformers
from paceline.store.trained_on import NOTHING, TRAINED_ON

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.config import ModelSection


def copy_drafter(
    target: ModelSection, folder: Path, layers: Sequence[int], num_draft_tokens: int, **model: Any
) -> DrafterSection:
    """Return a draft model with these layers of the target; its folder is written at the first use.

    model: further settings of the model, such as `weights`.
    """
    if not (folder / TRAINED_ON).is_file():  # the last file
        write_copy(target.model, folder, layers)
    same = target.model_dump(include={"dtype", "device"})
    settings = {"model": str(folder), **same, **model, "num_draft_tokens": num_draft_tokens}
    return DrafterSection(kind="draft_model", settings=settings)


def write_copy(model: str, folder: Path, layers: Sequence[int]) -> None:
    """Write a model with these of its layers, with its tokenizer and a record of no training.

    Raises ConfigError if the architecture keeps its layers elsewhere than in `model.layers`.
    """
    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    stack = getattr(getattr(loaded, "model", None), "layers", None)
    if not isinstance(stack, torch.nn.ModuleList):
        raise ConfigError(
            f"{model}: its layers cannot be left out ({type(loaded).__name__} has no model.layers); "
            "name a target of the Llama family"
        )
    loaded.model.layers = torch.nn.ModuleList([stack[i] for i in layers])
    loaded.config.num_hidden_layers = len(layers)
    types = getattr(loaded.config, "layer_types", None)
    if types is not None:
        loaded.config.layer_types = [types[i] for i in layers]
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        loaded.save_pretrained(folder)
    NOTHING.save(folder)


def outer_layers(num_layers: int, num_kept: int) -> list[int]:
    """Return the layers to keep when the middle of the stack is left out."""
    first = (num_kept + 1) // 2 if num_kept < num_layers else num_layers
    return [*range(first), *range(num_layers - (num_kept - first), num_layers)]
