"""Cosines and sines of rotary positions, from transformers' own modules."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class RotaryAngles:
    """Cosines and sines by position, in float32 whatever the model's dtype.

    kinds: the layer types that have angles of their own, in the order of the tables.
    """

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self.kinds: list[str] = list(getattr(rotary, "layer_types", ()))
        self.half_turned = self(1).shape[-1] // 2

    def __call__(self, length: int) -> torch.Tensor:
        """Return [length, tables, 2 * half_turned].

        A thread of its own computes them: in a forked child torch waits without end for the workers of
        the thread that forked, which do not exist there, but a new thread starts its own.
        """
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._tables, length).result()

    def _tables(self, length: int) -> torch.Tensor:
        kinds: Sequence[str | None] = self.kinds or (None,)
        return torch.stack([self._table(length, kind) for kind in kinds], dim=1)

    def _table(self, length: int, kind: str | None) -> torch.Tensor:
        like, positions = torch.zeros(1, dtype=torch.float32), torch.arange(length)[None]
        cos, sin = self._rotary(like, positions, *(() if kind is None else (kind,)))
        half = cos.shape[-1] // 2  # the second half is the same
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
