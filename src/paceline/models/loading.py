"""Models and tokenizers from a local folder or the hub, or one clear line of error.

Safetensors only; remote code runs only if the configuration allows it; every weight of the model must
be in the file, since a missing one would be filled with noise.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from paceline.errors import ModelError
from paceline.models.encoder_decoder import auto_class_of
from paceline.models.language_model import LanguageModel
from paceline.models.peft_adapters import merge_adapter
from paceline.models.self_checks import check_packed_forward
from paceline.store.trained_on import TrainedOn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from paceline.config import ModelSection

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOO_LONG: Final = "sequence-length-is-longer-than-the-specified-maximum"  # a warning, shown once


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and warnings while our own progress is shown."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """Return a device by name; `auto` is the first available of CUDA, MPS and CPU.

    Raises ModelError if it is not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, is_available in available.items() if is_available)
    if not available[device]:
        names = ", ".join(name for name, is_available in available.items() if is_available)
        raise ModelError(f"device '{device}' is not available here; available: {names}")
    return torch.device(device)


def _check_source(model: str) -> None:
    """Raise ModelError if a local folder is missing or holds no transformers model."""
    path = Path(model)
    looks_local = path.is_absolute() or model.startswith(".") or model.count("/") != 1
    if path.exists():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise ModelError(
                    f"{model}: this folder holds an adapter; name it as 'adapter' and its base model "
                    "as 'model'"
                )
            raise ModelError(f"{model}: no config.json in this folder; is it a transformers model?")
    elif looks_local:
        raise ModelError(f"{model}: no such folder; give a local model folder or a hub name")


def _reason(error: Exception) -> str:
    """Return the first line of an error; transformers' messages have many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _read(auto_class: Any, section: ModelSection, **options: Any) -> Any:
    """Return what one of transformers' auto classes reads from a model's folder or the hub."""
    with quiet_transformers():
        return auto_class.from_pretrained(
            section.model,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            **options,
        )


def load_config(section: ModelSection) -> Any:
    """Return the transformers configuration, without weights. Raises ModelError if there is none."""
    _check_source(section.model)
    try:
        return _read(AutoConfig, section)
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(f"{section.model}: {_reason(error)}") from error


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer. Raises ModelError if there is none."""
    _check_source(section.model)
    try:
        tokenizer: PreTrainedTokenizerBase = _read(AutoTokenizer, section)
    except (OSError, ValueError, HFValidationError) as error:
        remedy = "it should be in the model's folder, as tokenizer.json"
        if not Path(section.model).exists():
            remedy = "there is no local folder of that name either"
        raise ModelError(
            f"{section.model}: no usable tokenizer ({_reason(error)}); {remedy}"
        ) from error
    # a request reports a text that is too long, with the remedy
    getattr(tokenizer, "deprecation_warnings", {})[_TOO_LONG] = True
    return tokenizer


def load_language_model(section: ModelSection, name: str, exact: bool = False) -> LanguageModel:
    """Return a model after its self-check. exact: refuse one that the compiled forward cannot run.

    Raises ModelError if the weights are unreadable, incomplete or unsupported.
    """
    config = load_config(section)
    device = resolve_device(section.device) if section.device_map is None else None
    model = _load_weights(section, auto_class_of(config))
    if device is not None:
        model = model.to(device)
    if section.adapter is not None:
        with quiet_transformers():
            model = merge_adapter(model, section.adapter)
    language_model = LanguageModel(model, name, section.forward, exact, weights=section.weights)
    check_packed_forward(language_model)
    if section.adapter is None:
        language_model.trained_on = TrainedOn.load(section.model)
    return language_model


def _load_weights(section: ModelSection, auto_class: Any) -> Any:
    """Return transformers' model. Raises ModelError if weights are unreadable, missing or misshapen."""
    dtype = "auto" if section.dtype == "auto" else DTYPES[section.dtype]
    try:
        model, info = _read(
            auto_class,
            section,
            dtype=dtype,
            device_map=section.device_map,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ModelError(
            f"{section.model}: the weight file is damaged or truncated ({_reason(error)}); "
            "fetch or copy it again"
        ) from error
    except OSError as error:
        raise ModelError(
            f"{section.model}: no usable weights ({_reason(error)}); only safetensors are read"
        ) from error
    except (ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"{section.model}: {_reason(error)}") from error
    if info["mismatched_keys"]:
        weight, found, expected = min(info["mismatched_keys"])
        raise ModelError(
            f"{section.model}: config.json does not fit the weight file: '{weight}' is "
            f"{tuple(found)} there and should be {tuple(expected)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{section.model}: {len(missing)} weights are missing from the file (such as "
            f"'{missing[0]}'); the model would run on noise"
        )
    return model
