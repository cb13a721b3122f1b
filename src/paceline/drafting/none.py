"""Plain autoregressive decoding: the drafter that never proposes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from paceline.contracts import GREEDY, NONE, Drafts
from paceline.drafting.base import Drafter, Foresight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams


class NoneSettings(BaseModel):
    """`none` has no settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Nothing(Foresight):
    def accepted(self, position: int, limit: int) -> tuple[int, int]:
        return 0, 0


class NoneDrafter(Drafter):
    kind: ClassVar[str] = NONE
    Settings: ClassVar[type[BaseModel]] = NoneSettings

    def __init__(self, name: str = NONE, settings: NoneSettings | None = None) -> None:
        super().__init__(name, num_draft_tokens=0)

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        return Drafts(torch.empty((len(rows), 0), dtype=torch.int64), [0] * len(rows))

    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> Foresight:
        return _Nothing()
