"""A prompt as a caller gives it: text, token ids or chat messages. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final

from paceline.errors import RequestError, shorten
from paceline.requests.values import is_text, token_ids

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
