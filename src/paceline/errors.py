"""The exceptions a user of paceline can meet.

PacelineError                 anything the caller can mend; the CLI prints it, exit code 2
├── ConfigError               a setting: unknown key, bad value, contradiction, missing file
├── RequestError              a request that cannot be served: empty, too long, unsupported setting
├── ModelError                a model that cannot be used: unreadable weights, failed self-check
├── VocabularyError           a drafter whose tokens are not the target's
├── ArtefactError             a policy or cost table that was made for something else
├── StoreError                a collection that is unreadable or of another version
├── DrafterError              a drafter that broke its contract while a request was running
├── DecodingError             a request that ended early: its drafter, its rules or its logits failed
└── QueueFullError            a request that came while too many were waiting
"""

from __future__ import annotations

from typing import Final

ENDS_ALL: Final = (KeyboardInterrupt, GeneratorExit)
"""Exceptions that end the program wherever they are raised; any other is a failure of its plug-in."""


class PacelineError(Exception):
    """Base of all errors whose message tells the user what to change."""


class ConfigError(PacelineError):
    """A setting is unknown, of the wrong type, contradictory, or names a missing file."""


class RequestError(PacelineError):
    """A request cannot be served as asked."""


class ModelError(PacelineError):
    """A model cannot be loaded, or failed the self-check at load."""


class VocabularyError(PacelineError):
    """A drafter's token-to-id map differs from the target's."""


class ArtefactError(PacelineError):
    """A policy or cost table was made for other arms, models or features."""


class StoreError(PacelineError):
    """A collection cannot be read, or has another schema version."""


class DrafterError(PacelineError):
    """A drafter proposed something outside its contract."""


class DecodingError(PacelineError):
    """A request ended early because its drafter, its rules or the target's logits went wrong."""


class QueueFullError(PacelineError):
    """Too many requests wait already."""


_LONGEST: Final = 1000  # characters of an error in a message


def describe(error: BaseException) -> str:
    """Return an error's text for a message, or its type if it has no text or cannot be printed."""
    kind = type(error).__name__
    try:
        text = str(error)[:_LONGEST]
    except BaseException as second:
        if isinstance(second, ENDS_ALL):
            raise
        text = ""
    if not text:
        return kind
    # the text of these alone says little: `1`, `'name'`
    bare = isinstance(error, KeyError) or not isinstance(error, Exception)
    return f"{kind}: {text}" if bare else text


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
