"""Plain autoregressive decoding, as a drafter that proposes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.config import Section
from paceline.contracts import NONE, Drafts
from paceline.drafting.base import Drafter
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import RowView
    from paceline.store.trained_on import TrainedOn


class NoneDrafter(Drafter):
    kind = NONE
    Settings = Section

    def __init__(self, name: str = NONE, settings: Section | None = None) -> None:
        super().__init__(name, num_draft_tokens=0)

    def trained_on(self) -> TrainedOn:
        return NOTHING

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        return Drafts(torch.empty((len(rows), 0), dtype=torch.int64), [0] * len(rows))
