"""Python functions over flat arrays, compiled to machine code.

Compiled code is cached on disk next to the source, or in the user's cache folder if the package is
read-only. The cache is renewed when its own file changes, not when a called function changes. So
functions that call each other belong in one module; an `entry` names the other modules.

numba examines every array of a call, which costs microseconds, more where other work has emptied the
processor's caches. An entry takes whole numbers, some of them addresses of arrays, and costs about one
microsecond per call.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

F = TypeVar("F", bound="Callable[..., Any]")

carray: Any = vars(numba)["carray"]  # an array at a pointer


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


def uncached(function: F) -> F:
    """Return `function` compiled anew with each entry that calls it.

    So it may use other modules, whose changes a cache of its own would not notice.
    """
    return cast("F", numba.njit(error_model="numpy")(function))


def entry(
    make: Callable[[int], Callable[..., int]], num_arguments: int, calls: tuple[ModuleType, ...]
) -> Callable[..., int]:
    """Return a compiled function of int64 arguments and result that Python calls directly.

    make(version) returns the function; it must use `version`, which tells numba's cache whether it is
    of the present code of `calls`, the modules whose compiled functions or constants it uses.
    """
    digest = hashlib.sha256()
    for module in calls:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    function = make(int.from_bytes(digest.digest()[:7], "little") | 1)
    signature = types.int64(*[types.int64] * num_arguments)
    machine: Any
    try:
        machine = numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder for the cache: it is compiled once per process
        machine = numba.cfunc(signature, error_model="numpy")(function)
    kind = ctypes.PYFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * num_arguments)
    # it keeps the interpreter's lock: waiting for it again may take longer than the call
    called: Any = kind(machine.address)
    called.kept = machine  # the code lives as long as the object
    return cast("Callable[..., int]", called)


def _pointer_to(kind: Any) -> Any:
    """Return an intrinsic that makes an address, int64, a pointer for `numba.carray`."""
    pointer_type: Any = types.CPointer(kind)  # type: ignore[no-untyped-call]

    @intrinsic
    def pointer(typingctx, address):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(pointer_type))

        return pointer_type(types.int64), codegen

    return pointer


int64_at, int32_at, float64_at = map(_pointer_to, (types.int64, types.int32, types.float64))
