"""Cosines and sines of rotary positions, from transformers' own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_PART: Final = 64  # positions


class RotaryAngles:
    """Cosines and sines by position, in float32 whatever the model's dtype.

    kinds: the layer types that have angles of their own, in the order of the tables.
    """

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self.kinds: list[str] = list(getattr(rotary, "layer_types", ()))
        self.half_turned = self(1).shape[-1] // 2

    def __call__(self, length: int) -> torch.Tensor:
        """Return [positions, tables, 2 * half_turned].

        Parts are so small that torch does not share them among its threads, for which a forked child
        would wait without end.
        """
        kinds: Sequence[str | None] = self.kinds or (None,)
        bounds = [(start, min(length, start + _PART)) for start in range(0, length, _PART)]
        tables = [np.concatenate([self._part(*part, kind) for part in bounds]) for kind in kinds]
        return torch.from_numpy(np.stack(tables, axis=1))

    def _part(self, start: int, stop: int, kind: str | None) -> np.ndarray:
        like, positions = torch.zeros(1, dtype=torch.float32), torch.arange(start, stop)[None]
        cos, sin = self._rotary(like, positions, *(() if kind is None else (kind,)))
        half = cos.shape[-1] // 2  # the second half is the same
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).numpy()
