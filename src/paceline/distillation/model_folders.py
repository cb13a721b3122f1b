"""Folders of trained models in transformers' format: written, read, and put in place.

Knows no training.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig
from transformers.utils import CONFIG_NAME

from paceline.errors import ConfigError, shorten
from paceline.models.encoder_decoder import auto_class_of, is_encoder_decoder, start_token
from paceline.models.loading import DTYPES, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PreTrainedModel


def load_float32(folder: Path) -> PreTrainedModel:
    """Return a folder's model, its weights as saved. Raises OSError or ValueError without one."""
    return load_model(folder, torch.float32)


def load_model(folder: Path, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """Return a folder's causal or encoder-decoder model. Raises as `load_float32` does."""
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        model: PreTrainedModel = auto_class_of(config).from_pretrained(folder, dtype=dtype)
    return model


def save_student(
    model: PreTrainedModel, tokenizer: Any, ends: Iterable[int], folder: Path, dtype: str
) -> None:
    """Write a trained model, converted to `dtype`, and its tokenizer. ends: ids that end an answer.

    Raises ConfigError if the disk is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.to(DTYPES[dtype])  # type: ignore[arg-type]
    end = sorted(ends)
    start = start_token(model, folder.name) if is_encoder_decoder(model) else None
    model.generation_config = GenerationConfig(
        eos_token_id=end[0] if len(end) == 1 else end or None,
        pad_token_id=model.config.pad_token_id,
        decoder_start_token_id=start,
    )
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Write a model as `save_pretrained` does. Raises ConfigError if the disk is full."""
    try:
        with quiet_transformers():
            model.save_pretrained(folder, **options)
        mode = (folder / CONFIG_NAME).stat().st_mode
        for weights in folder.glob("*.safetensors"):
            weights.chmod(mode)  # safetensors lets the owner alone read them
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, "weights", error) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as `save_pretrained` does. Raises ConfigError if the disk is full."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises the base class for a failed write
        raise _unwritable(folder, "tokenizer", error) from error


def _unwritable(folder: Path, what: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{folder}: the {what} cannot be written ({shorten(str(error))}); the training is kept: "
        "make room and run the same command"
    )


def publish_folder(made: Path, out: Path) -> None:
    """Put the finished folder in its place; an earlier drafter goes into the folder of the work."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        before = made.with_name("before")
        shutil.rmtree(before, ignore_errors=True)
        # a drafter that is removed file by file would be a damaged one after a kill
        out.replace(before)
    made.replace(out)
