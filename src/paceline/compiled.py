"""Python functions over flat arrays, compiled to machine code.

Compiled code is cached on disk next to the source, or in the user's cache folder if the package is
read-only. The cache is renewed when its own file changes, not when a called function changes, so
functions that call each other belong in one module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")


def compiled(function: F) -> F:
    """Return `function` compiled, with the arithmetic of the IEEE standard."""
    machine: Any
    try:
        machine = numba.njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder for the cache: it is compiled once per process
        machine = numba.njit(error_model="numpy")(function)
    return cast("F", machine)


def inlined(function: F) -> F:
    """Return `function` compiled into each of its compiled callers.

    numba counts the references of all arrays that it passes to a function, which may take longer than
    the function itself.
    """
    return cast("F", numba.njit(inline="always", error_model="numpy")(function))
