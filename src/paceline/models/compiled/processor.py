"""Which kernels this machine's processor can run.

- `amx`: tiles of bfloat16 (Intel, since Sapphire Rapids);
- `avx512_bf16`: pairs of bfloat16 in vectors of 512 bits (AMD since Zen 4, Intel);
- `avx512`: weights widened to float32, vectors of 512 bits;
- `generic`: the same in whatever vectors there are (AVX2, NEON).
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from typing import Final

import llvmlite.binding as llvm

from paceline.errors import ConfigError

KERNELS: Final = ("amx", "avx512_bf16", "avx512", "generic")
SETTING: Final = "PACELINE_KERNELS"

_NEEDS: Final = {
    "amx": ("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512vnni"),
    "avx512_bf16": ("avx512f", "avx512bf16", "avx512vnni"),
    "avx512": ("avx512f",),
    "generic": (),
}
_ARCH_PRCTL: Final = 158  # Linux's system call on x86-64
_REQUEST_TILES: Final = (0x1023, 18)  # ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA


@cache
def available() -> tuple[str, ...]:
    """Return the kernels that this processor can run, the fastest first."""
    features = llvm.get_host_cpu_features()
    found = [k for k in KERNELS if all(features.get(need, False) for need in _NEEDS[k])]
    if "amx" in found and not _tiles_allowed():
        found.remove("amx")
    return tuple(found)


def _tiles_allowed() -> bool:
    """Ask the system for the tile registers, which it keeps from processes that do not ask."""
    if platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, *_REQUEST_TILES) == 0


def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for products of bfloat16."""
    return not {"amx", "avx512_bf16"}.isdisjoint(available())


def kernels() -> str:
    """Return the kernels to use: those that PACELINE_KERNELS names, else the fastest.

    Raises ConfigError if the processor cannot run them.
    """
    forced = os.environ.get(SETTING)
    if forced is None:
        return available()[0]
    if forced not in available():
        raise ConfigError(
            f"{SETTING} is '{forced}', and this processor runs {', '.join(available())}; unset it, or "
            "name one of these"
        )
    return forced
