"""Containment of plug-ins: an exception ends the request it belongs to, and no other.

Drafters, policies, controls and `on_complete` may be anybody's code. A drafter that fails in several
requests in succession is set aside: the policy's requests no longer use it.
"""

from __future__ import annotations

import traceback
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from paceline.errors import ENDS_ALL, DrafterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.engine.rows import Row

MOST_FAILURES: Final = 3
"""Successive requests that a drafter fails in before it is set aside."""


@contextmanager
def contained(tell: Callable[[BaseException], object]) -> Iterator[None]:
    """Hand whatever the block raises, except `ENDS_ALL`, to `tell`, and go on after the block."""
    try:
        yield
    except ENDS_ALL:
        raise
    except BaseException as error:  # noqa: BLE001 - a plug-in may raise anything
        tell(error)


@contextmanager
def asking(
    row: Row, name: str, tell: Callable[[str, BaseException], object] | None = None
) -> Iterator[None]:
    """Contain what a drafter raises while it works for one row, whose text it must not change.

    By default the row fails; with `tell` only a changed text fails it.
    """
    text = len(row.tokens), row.tokens[-1]
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - a plug-in may raise anything
        failure = error
    kept = row.keeps_text(*text)
    if isinstance(failure, ENDS_ALL):
        raise failure
    if failure is not None:
        (tell or row.fail_by)(name, failure)
    if not kept:
        row.fail_by(name, text_changed())


def text_changed() -> DrafterError:
    """Return the error of a drafter that wrote into its row's tokens."""
    return DrafterError("changed row.tokens, which are the engine's; copy them first")


def warn(message: str) -> None:
    """Warn. If warnings are errors, print this one instead, so that no request ends."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning as error:
        traceback.print_exception(error)


class DisabledDrafters:
    """The drafters that `auto` does not use, because their last `MOST_FAILURES` requests failed."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}  # in succession

    def __contains__(self, drafter: str) -> bool:
        return self._failures.get(drafter, 0) >= MOST_FAILURES

    def learn(self, row: Row) -> None:
        """Count a request that has ended, for every drafter that worked on it."""
        used = [row.drafter_name] if row.prepared and row.rounds and row.error is None else []
        for name in (*used, *(name for name, prepared in row.kept.items() if prepared)):
            if name not in row.failures:
                self._failures.pop(name, None)
        for name, error in row.failures.items():
            count = self._failures[name] = self._failures.get(name, 0) + 1
            if count == MOST_FAILURES:
                warn(
                    f"drafter '{name}' failed in {count} requests in a row and is set aside: a policy's "
                    f"requests do without it until one that names it succeeds. The last error: {error}"
                )
