"""Python functions over flat arrays as machine code.

Compiled code is kept on disk beside the source, or in the user's cache folder where the package
cannot be written to. A cache is renewed when its own file changes and not when a function that it
calls does, so functions that call each other belong in one module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numba

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")


def compiled(function: F) -> F:
    """`function` without the interpreter; its arithmetic stays that of the IEEE standard."""
    machine: Any
    try:
        machine = numba.njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # nowhere to keep it: then it is compiled once a process
        machine = numba.njit(error_model="numpy")(function)
    return machine  # type: ignore[no-any-return]
