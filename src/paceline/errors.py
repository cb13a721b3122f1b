"""The exceptions that paceline raises for its callers, and values in their messages."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

ENDS_ALL: Final = (KeyboardInterrupt, GeneratorExit)
"""Exceptions that end the program; plug-in code may raise any other without ending it."""


class PacelineError(Exception):
    """Base of all: a mistake that the caller can correct; the CLI exits with code 2."""


class ConfigError(PacelineError):
    """A setting is unknown, of the wrong type, contradictory, or names a missing file."""


class RequestError(PacelineError):
    """A request cannot be served as asked: empty, too long, with an unsupported setting."""


class ModelError(PacelineError):
    """A model cannot be used: unreadable weights, a failed self-check at load."""


class VocabularyError(PacelineError):
    """A drafter's token-to-id map differs from the target's."""


class ArtefactError(PacelineError):
    """A policy or cost table was made for other arms, models or features."""


class StoreError(PacelineError):
    """A collection cannot be read, or has another schema version."""


class DrafterError(PacelineError):
    """A drafter broke its contract during a request."""


class DecodingError(PacelineError):
    """A request ended early because its drafter, its rules or the target's logits failed."""


class QueueFullError(PacelineError):
    """A request arrived while the queue was full."""


_MAX_ERROR_CHARACTERS: Final = 1000  # in a message


def describe(error: BaseException) -> str:
    """Return an error's text for a message, or its type if it has no text or cannot be printed."""
    kind = type(error).__name__
    try:
        text = str(error)[:_MAX_ERROR_CHARACTERS]
    except BaseException as unprintable:
        if isinstance(unprintable, ENDS_ALL):
            raise
        text = ""
    if not text:
        return kind
    # their texts, such as `1` or `'name'`, are unclear without the type
    needs_type = isinstance(error, KeyError) or not isinstance(error, Exception)
    return f"{kind}: {text}" if needs_type else text


def shorten(value: object, most: int = 80) -> str:
    """Return a value for a message: one line of at most `most` characters."""
    try:
        text = " ".join(repr(value).split())
    except BaseException as error:  # a caller's own object, or an integer above 4300 digits
        if isinstance(error, ENDS_ALL):
            raise
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: object) -> str:
    """Return a value and its type for a message, in one line."""
    return f"{shorten(value, 60)} ({type(value).__name__})"


def suggest_name(name: str, valid: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest valid name, or all of them."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid: {', '.join(names)}"
