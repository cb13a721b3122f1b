"""Compiled code on disk: numba makes LLVM's intermediate code, LLVM an object file, the file is kept.

A folder per version of this code, of numba and LLVM, and per processor, in the user's cache folder or
where PACELINE_CACHE points. A file is written under another name and moved, so any number of
processes may make it at once; one that does not match its checksum is made again.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import types

from paceline import noise
from paceline.models.compiled import entry
from paceline.models.compiled.program import make_run
from paceline.noise import kernels, splitmix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_LOG: Final = logging.getLogger("paceline")  # Python shows its warnings where none is set up
_CHECKSUM_BYTES: Final = 32
_EXTERNAL: Final = re.compile(r'^declare [^@]*@"?(?!llvm\.)([\w.$]+)"?\(', re.MULTILINE)
# functions that LLVM may call where the processor has no instruction
_BY_CODE_GENERATION: Final = (
    "memset",
    "memcpy",
    "memmove",
    "fmaf",
    "sqrtf",
    "rintf",
    "logf",
    "log1pf",
    "log",
    "log1p",
)


@cache
def source_version() -> str:
    """Return a hash of this folder's code, numba, LLVM and the processor."""
    digest = hashlib.sha256()
    # `race` calls functions of theirs
    from_noise = (noise.__file__, kernels.__file__, splitmix.__file__)
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *map(Path, from_noise)):
        digest.update(path.read_bytes())
    features = llvm.get_host_cpu_features().flatten()
    chosen = [os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    facts = (numba.__version__, llvmlite.__version__, llvm.get_host_cpu_name(), features, chosen)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


def cache_folder() -> Path:
    """Return the folder of compiled code.

    Raises RuntimeError if no variable names one and the user has no home folder.
    """
    own = os.environ.get("PACELINE_CACHE")
    root = (
        Path(own)
        if own
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"
    )
    return root / "compiled" / source_version()


def function_address(name: str, make: Callable[[], Callable[..., Any]], arguments: int) -> int:
    """Return the address of a compiled function of int64 arguments, from its file if there is one.

    name: of the file. make: returns the function. The result is int64 for `follow`, else nothing.
    """
    try:
        path: Path | None = cache_folder() / f"{name}.o"
    except RuntimeError as error:
        path = None
        _warn_of(f"has no folder ({error})")
    stored = None if path is None else _read(path)
    if stored is None:
        _LOG.warning("paceline compiles its forward for this processor, once: %s", name)
        stored = _compile(make(), arguments, types.int64 if name == "follow" else types.void)
        if path is not None:
            _write(path, *stored)
    symbol, external, code = stored
    _resolve(external)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = int(engine.get_function_address(symbol))
    engine.detach()  # never unloaded, since a follower may still run it when the interpreter ends
    return address


def _compile(
    function: Callable[..., Any], arguments: int, result: Any
) -> tuple[str, list[str], bytes]:
    """Return the symbol to call, the functions that are called outside, and the object file."""
    made: Any = numba.cfunc(result(*[types.int64] * arguments), error_model="numpy")(function)
    # numba's own object, since the intermediate code that it shows has passed code generation, and
    # another pass over it may change what it does
    _, _, (code, _) = made._library.serialize_using_object_code()
    return made.native_name, _EXTERNAL.findall(made.inspect_llvm()), code


def _resolve(names: Iterable[str]) -> None:
    """Tell LLVM's loader the addresses of functions that compiled code may call.

    If one is missing, the loader leaves them all without an address. Those that nothing defines are
    numba's, for errors that this code does not raise; they abort the process.
    """
    process = ctypes.CDLL(None)
    for name in (*names, *_BY_CODE_GENERATION):
        if not llvm.address_of_symbol(name):
            function = getattr(process, name, process.abort)
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


def _machine() -> Any:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )


def _read(path: Path) -> tuple[str, list[str], bytes] | None:
    """Return what `_compile` returned from a path, or None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, body = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        return None
    names, _, code = body.partition(b"\n")
    symbol, *external = names.decode().split()
    return symbol, external, code


def _write(path: Path, symbol: str, external: Sequence[str], code: bytes) -> None:
    """Keep an object file; where no folder can be written, it is compiled once per process."""
    body = " ".join((symbol, *external)).encode() + b"\n" + code
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(body).digest() + body)
        temporary = Path(file.name)
        try:
            temporary.chmod(0o644)  # other users may share the folder
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _warn_of(f"cannot be kept in {path.parent} ({error})")


def _warn_of(trouble: str) -> None:
    warnings.warn(
        f"compiled code {trouble}, so every process compiles it; "
        "set PACELINE_CACHE to a folder that can be written",
        stacklevel=2,
    )


@cache
def control_functions() -> tuple[Callable[..., None], Callable[..., int]]:
    """Return `entry.lead` and `entry.follow`."""
    lead = function_address("lead", lambda: entry.lead, 3)
    follow = function_address("follow", lambda: entry.follow, 5)
    number = ctypes.c_int64
    return (
        ctypes.CFUNCTYPE(None, *[number] * 3)(lead),
        ctypes.CFUNCTYPE(number, *[number] * 5)(follow),
    )


@cache
def run_address(kernels: str, dtype: str, weights: str) -> int:
    """Return the address of `program.make_run`'s function for a processor, a dtype and weights."""
    name = f"run_{kernels}_{dtype}" if weights == dtype else f"run_{kernels}_{dtype}_{weights}"
    return function_address(name, lambda: make_run(kernels, dtype, weights), 3)
