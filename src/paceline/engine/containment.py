"""Containment of plug-ins: an exception ends the request it belongs to, and no other.

Drafters, policies, controllers and `on_complete` may be the user's own code. A drafter that fails in
several successive requests is disabled: the policy's requests no longer use it.
"""

from __future__ import annotations

import traceback
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from paceline.errors import ENDS_ALL, DrafterError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from paceline.contracts import Request
    from paceline.engine.rows import Row

MOST_FAILURES: Final = 3
"""Successive requests in which a drafter fails before it is disabled."""


class contained:  # noqa: N801 - a context, read like contextlib.suppress
    """A block whose exceptions except `ENDS_ALL` go to `on_error`; the code after it runs.

    A class, because a generator's context takes several times as long, in every round.
    """

    __slots__ = ("_on_error",)

    def __init__(self, on_error: Callable[[BaseException], object]) -> None:
        self._on_error = on_error

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None or isinstance(error, ENDS_ALL):
            return False
        self._on_error(error)
        return True


@contextmanager
def asking(
    row: Row, name: str, on_error: Callable[[str, BaseException], object] | None = None
) -> Iterator[None]:
    """Contain the exceptions of a drafter that works for one row, whose text it must not change.

    By default the row fails; with `on_error` only a changed text fails it.
    """
    text_state = row.text_state
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - a plug-in may raise anything
        failure = error
    is_unchanged = row.restore_text(*text_state)
    if isinstance(failure, ENDS_ALL):
        raise failure
    if failure is not None:
        (on_error or row.fail_by)(name, failure)
    if not is_unchanged:
        row.fail_by(name, text_changed())


def text_changed() -> DrafterError:
    """Return the error of a drafter that wrote into its row's tokens."""
    return DrafterError(
        "changed row.tokens or row.num_cached, which are the engine's; copy them first"
    )


def warn(message: str) -> None:
    """Give a warning. If warnings are errors, print it instead, so that no request ends."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning as error:
        traceback.print_exception(error)


class CompletionFailures:
    """The failures of an engine's `on_complete`, of which the first becomes a warning."""

    def __init__(self) -> None:
        self._has_warned = False

    def warn(self, request: Request, error: BaseException) -> None:
        """Warn that `on_complete` fails, the first time only. Requests continue."""
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"on_complete failed for request '{request.id}' ({describe(error)}), so its record of "
                "completed requests is incomplete; requests go on, and later failures are not reported"
            )


class DisabledDrafters:
    """The drafters that `auto` does not use, because their last `MOST_FAILURES` requests failed."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}  # in succession

    def __contains__(self, drafter: str) -> bool:
        return self._failures.get(drafter, 0) >= MOST_FAILURES

    def count(self, row: Row) -> None:
        """Count a request that has ended, for every drafter that worked on it."""
        in_use = row.drafter_name
        for name, started in row.started.items():
            worked = name != in_use or (row.rounds and row.error is None)
            if started.is_prepared and worked and name not in row.failures:
                self._failures.pop(name, None)
        for name, error in row.failures.items():
            count = self._failures[name] = self._failures.get(name, 0) + 1
            if count == MOST_FAILURES:
                warn(
                    f"drafter '{name}' failed in {count} requests in a row and is set aside: a policy's "
                    f"requests do without it until one that names it succeeds. The last error: {error}"
                )
