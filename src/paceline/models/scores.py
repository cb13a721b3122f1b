"""The scores of a target at the places of a packed forward, as the judge reads them.

Symbols: N packed tokens, V logits width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
        best, ids = logits.max(dim=-1)
        return cls(torch.where(best.isfinite(), ids, -1).tolist(), logits)
