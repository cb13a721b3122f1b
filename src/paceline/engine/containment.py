"""What a plug-in raises is told to whoever it concerns, and stops nothing else.

Drafters, policies, watches and what is done with completed requests may come from anywhere. A drafter
that fails in request after request is set aside, so that the policy's requests do without it.
"""

from __future__ import annotations

import traceback
import warnings
from typing import TYPE_CHECKING, Final

from paceline.errors import ENDS_ALL, DrafterError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from paceline.engine.rows import Row

MOST_FAILURES: Final = 3
"""Requests in a row that a drafter may fail in before it is set aside."""


class contained:  # noqa: N801 - reads as what it is, a clause of `with`
    """Hands whatever is raised inside but `ENDS_ALL` to `tell`, and goes on behind the block."""

    __slots__ = ("_tell",)

    def __init__(self, tell: Callable[[BaseException], object]) -> None:
        self._tell = tell

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None or isinstance(error, ENDS_ALL):
            return False
        self._tell(error)
        return True


class asking:  # noqa: N801 - as above
    """Contains what a drafter raises while it is asked about one row, whose text it must leave alone.

    By default the row fails; with `tell` only what is raised goes there.
    """

    __slots__ = ("_name", "_row", "_tell", "_text")

    def __init__(
        self, row: Row, name: str, tell: Callable[[str, BaseException], object] | None = None
    ) -> None:
        self._row, self._name, self._tell = row, name, tell or row.fail_by

    def __enter__(self) -> None:
        self._text = len(self._row.tokens), self._row.tokens[-1]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        kept = self._row.keeps_text(*self._text)
        if isinstance(error, ENDS_ALL):
            return False
        if error is not None:
            self._tell(self._name, error)
        if not kept:
            self._row.fail_by(self._name, text_changed())
        return True


def text_changed() -> DrafterError:
    """What a drafter did that wrote into its row."""
    return DrafterError("changed row.tokens, which are the engine's; copy them first")


def warn(message: str) -> None:
    """Warn; where warnings are errors, show this one without ending what others asked for."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning as error:
        traceback.print_exception(error)


class SetAside:
    """The drafters that `auto` does without: each failed in its last requests, one after the other."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}  # in a row

    def __contains__(self, drafter: str) -> bool:
        return self._failures.get(drafter, 0) >= MOST_FAILURES

    def learn(self, row: Row) -> None:
        """Count a request that has ended, for every drafter that it can speak for."""
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
