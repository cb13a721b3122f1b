"""Models fine-tuned with PEFT: adapters such as LoRA in addition to the weights of a base model.

An adapter that a configuration names is merged into the weights at load, so that it costs nothing
afterwards. Transformers' forward runs a PEFT model from memory unmerged.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_of(model: Any, name: str) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, or the model itself.

    Raises ModelError for prompt learning.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        plain: PreTrainedModel = model
        return plain
    if model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{name}: {model.active_peft_config.peft_type.value} puts states of its own before the "
            "text, which the packed forward does not know; only adapters inside the layers, such as "
            "LoRA, are supported"
        )
    inside: PreTrainedModel = model.get_base_model()
    return inside


def merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Return the model with the adapter merged into its weights. adapter: folder or hub name.

    Raises ModelError if PEFT is missing or the adapter does not fit.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"adapter {adapter}: needs PEFT; install it with: pip install 'paceline[adapters]'"
        ) from error
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(f"adapter {adapter}: no adapter_config.json in this folder")
    try:
        with warnings.catch_warnings():
            # PEFT would use noise or zeros for weights that the file lacks
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            wrapped: Any = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if len(lines) > 1 and lines[0].endswith(":"):  # torch's heading
            lines = lines[1:]
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(f"adapter {adapter}: does not fit the model ({reason})") from error
    base_of(wrapped, f"adapter {adapter}")
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged
