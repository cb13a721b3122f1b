"""The scores of a target at the places of a packed forward, as the judge reads them.

Symbols: N packed tokens, V logits width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


class Scores(NamedTuple):
    """The target's most likely token at each of N places, and its logits where they are wanted.

    choices: [N] ids, of equal logits the lowest; -1 where the largest logit is not finite: one is nan
    or inf, or all are -inf. logits: [N, V]; None if no row reads them.
    """

    choices: list[int]
    logits: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor) -> Scores:
        """Return the scores of logits [N, V], after one copy from the device."""
        return cls(most_likely(logits), logits)


def most_likely(logits: Tensor) -> list[int]:
    """Return the choices [N] of logits [N, V], as `Scores` has them."""
    if logits.device.type != "cpu":
        best, ids = logits.max(dim=-1)
        found: list[int] = torch.where(best.isfinite(), ids, -1).tolist()
        return found
    # on the CPU, numpy's argmax takes a fraction of the time; it has no bfloat16
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    values = wide.detach().numpy()
    places = values.argmax(axis=-1)
    finite = np.isfinite(values[np.arange(len(places)), places])
    choices: list[int] = np.where(finite, places, -1).tolist()
    return choices
