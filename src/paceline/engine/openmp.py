"""The end of a thread's OpenMP workers before another thread computes.

GNU OpenMP, which torch uses on Linux, keeps a pool of workers for every thread that has computed. With
more workers than cores, workers sleep at each barrier instead of spinning, and a forward of small
products takes two to three times as long. So a caller that waits for the driver's thread ends its own
workers, and that thread ends its own when it has no work. Starting a new pool takes about 50 us.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

_SOFT: Final = 1  # omp_pause_soft: workers end, settings stay

# OpenMP 5.0; None if the process has another runtime
_pause: Final[Any] = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)


def release_pool() -> None:
    """End the OpenMP workers of the calling thread, if it has any."""
    if _pause is not None:
        _pause(_SOFT)
