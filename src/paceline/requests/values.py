"""Readers of single values, and of a prompt as a caller gives it. Know no tokenizer.

A reader of a value returns a plain Python value or raises ValueError that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import wraps
from typing import Any, Final, TypeVar

import numpy as np
import torch

from paceline.contracts import LogitsProcessor
from paceline.errors import RequestError, shorten

T = TypeVar("T")

MIN_TEMPERATURE: Final = 1e-8  # below it, logits divided by the temperature exceed float32
MAX_TEMPERATURE: Final = 1e6
_MAX_FLOAT32: Final = 3.4e38
_BYTES_OR_TEXT: Final = (str, bytes, bytearray, memoryview)


def plain(value: Any) -> Any:
    """Return a scalar of numpy or torch as Python's, anything else unchanged."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
        try:
            return value.item()
        except Exception:  # noqa: BLE001 - a tensor without values, or of an unreadable kind
            return value
    return value


def _contained(read: Callable[[Any], T]) -> Callable[[Any], T]:
    """Decorate a reader to raise ValueError whatever else a value raises when it is read."""

    @wraps(read)
    def reader(value: Any) -> T:
        try:
            return read(value)
        except ValueError:
            raise
        except Exception as error:  # a caller's own object, a tensor that cannot be listed
            raise ValueError(f"got {shorten(value)}") from error

    return reader


@_contained
def token_ids(value: Any) -> tuple[int, ...]:
    """Return token ids from a sequence, a set or a one-dimensional array of whole numbers."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _ids_of_array(value)
    if not isinstance(value, (Sequence, AbstractSet)) or isinstance(value, _BYTES_OR_TEXT):
        raise ValueError(f"got {shorten(value)}")
    if set(map(type, value)) <= {int}:
        return tuple(value)
    ids = tuple(map(plain, value))
    wrong = [given for given, id in zip(value, ids, strict=True) if not _is_whole(id)]
    if wrong:
        raise ValueError(f"got {shorten(wrong[0])}")
    return tuple(map(int, ids))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids_of_array(array: np.ndarray | torch.Tensor) -> tuple[int, ...]:
    shape = list(array.shape)
    if len(shape) != 1:
        raise ValueError(f"got an array of shape {shape}")
    if isinstance(array, torch.Tensor):
        whole = not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)
        whole = whole and not (array.is_meta or array.is_quantized)
    else:
        whole = np.issubdtype(array.dtype, np.integer)
    if not whole:
        raise ValueError(f"got an array of {array.dtype}")
    ids = tuple(array.tolist())
    if not set(map(type, ids)) <= {int}:  # masked numbers, time spans
        raise ValueError(f"got {shorten(array)}")
    return ids


def id_set(value: Any) -> frozenset[int]:
    """Return token ids as a set."""
    return frozenset(token_ids(value))


def features(value: Any) -> torch.Tensor | None:
    """Return features [bins, frames] of audio as a float32 tensor; None for None.

    Raises RequestError for anything else.
    """
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value)) if value.dtype.kind == "f" else None
    is_array = isinstance(value, torch.Tensor) and value.ndim == 2 and value.is_floating_point()
    if not is_array or value.is_meta or not bool(value.isfinite().all()):
        raise RequestError(
            "features must be an array [bins, frames] of finite floats, one row of what the model's "
            f"feature extractor gives as input_features; got {shorten(value)}"
        )
    return torch.as_tensor(value.detach(), dtype=torch.float32)


@_contained
def strings(value: Any) -> tuple[str, ...]:
    """Return stop strings from one string or several."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, (Sequence, AbstractSet)) or isinstance(value, _BYTES_OR_TEXT):
        raise ValueError(f"got {shorten(value)}")
    for string in value:
        if not isinstance(string, str) or not is_text(string):
            raise ValueError(f"got {shorten(string)}")
    if not all(value):
        raise ValueError("a stop string is empty")
    return tuple(map(str, value))


def is_text(text: str) -> bool:
    """Return whether a string can be encoded, so has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@_contained
def biases(value: Any) -> dict[int, float]:
    """Return a logit bias per token id; each is finite in float32 or -inf."""
    if not isinstance(value, Mapping):
        raise ValueError(f"got {shorten(value)}")
    read: dict[int, float] = {}
    for key, given in value.items():
        id, bias = plain(key), plain(given)
        if not _is_whole(id):
            raise ValueError(f"got the id {shorten(key)}")
        is_number = isinstance(bias, float) or _is_whole(bias)
        if not is_number or not (bias == -np.inf or abs(bias) <= _MAX_FLOAT32):
            raise ValueError(f"got {shorten(given)} for the id {shorten(id)}")
        read[int(id)] = float(bias)
    return read


@_contained
def logits_processors(value: Any) -> tuple[LogitsProcessor, ...]:
    """Return logits processors from a list or tuple of callables."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"got {shorten(value)}")
    for processor in value:
        if not callable(processor):
            raise ValueError(f"got {shorten(processor)}")
    return tuple(value)


def temperature(value: float) -> float:
    """Return a temperature that is 0 or within the bounds."""
    if value != 0.0 and not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise ValueError(f"got {value}")
    return value


def seed(value: Any) -> int | None:
    """Return the last 64 bits of a seed as a signed integer; small seeds are unchanged."""
    value = plain(value)
    if value is None:
        return None
    if not _is_whole(value):
        raise ValueError(f"got {shorten(value)}")
    return int((value + 2**63) % 2**64 - 2**63)


# --- prompts ---------------------------------------------------------------------------------------

_PROMPTS: Final = "a string, token ids, one message or a list of messages"


def read_prompt(prompt: Any) -> str | tuple[int, ...] | list[dict[str, Any]]:
    """Return a prompt as text, token ids or messages. Raises RequestError for anything else."""
    if isinstance(prompt, str):
        _check_text("prompt", prompt)
        return prompt
    if isinstance(prompt, Mapping):
        return [_message(prompt)]
    first = prompt[0] if isinstance(prompt, (list, tuple)) and prompt else None
    if isinstance(first, Mapping):
        return [_message(message) for message in prompt]
    if isinstance(first, str):
        raise RequestError(
            f"prompt must be {_PROMPTS}; got a list of strings (`generate` takes several prompts)"
        )
    if isinstance(prompt, AbstractSet):  # it has no order
        raise RequestError(f"prompt must be {_PROMPTS}; got {shorten(prompt)}")
    return prompt_ids(prompt)


def prompt_ids(prompt: Any) -> tuple[int, ...]:
    """Return a prompt of token ids. Raises RequestError for anything else."""
    try:
        return token_ids(prompt)
    except ValueError as error:
        raise RequestError(
            f"prompt must be {_PROMPTS}, ids as whole numbers in one dimension; {error}"
        ) from error


def _message(message: Any) -> dict[str, Any]:
    """Return a chat message after checking role and content; other keys are for the template."""
    try:
        message = dict(message) if isinstance(message, Mapping) else message
    except Exception:  # noqa: BLE001 - a caller's own mapping, refused below
        message = shorten(message)
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise RequestError(
            "a message must be a mapping such as {'role': 'user', 'content': 'Hello'}; got "
            f"{shorten(message)}"
        )
    if not isinstance(message.get("role"), str):
        raise RequestError(
            f"a message needs 'role', a string such as 'user'; got {shorten(message)}"
        )
    content = message.get("content")
    calls_tools = content is None and bool(message.get("tool_calls"))
    if not (isinstance(content, (str, list)) or calls_tools):
        raise RequestError(
            f"a message needs 'content', a string or a list of parts; got {shorten(message)}"
        )
    if isinstance(content, str):
        _check_text("a message", content)
    return message


def _check_text(what: str, text: str) -> None:
    if not is_text(text):
        raise RequestError(
            f"{what} holds a lone surrogate, which cannot be encoded: {shorten(text)}; decode it "
            "with errors='replace'"
        )
