"""Drafts copied from the text so far: the tokens after the longest earlier match of its suffix.

The drafter needs no model and no training. It is fast where the answer repeats the prompt or itself. Of
equally long matches the latest counts. A suffix index per row finds it in a time that does not depend on
the length of the text. A match that reaches the end of the text is continued periodically, as copying
token by token would. After prompt lookup decoding (Saxena, 2023), with every match length up to
`max_ngram` instead of a short list. `drafting.draft_length` has the rules of a draft's length, in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section
from paceline.contracts import Drafts
from paceline.drafting.base import Drafter, pad_drafts
from paceline.drafting.suffix_index import RowIndices
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import RowView
    from paceline.store.trained_on import TrainedOn


class PromptLookupSettings(Section):
    """Settings. num_draft_tokens: maximum per draft. min_ngram, max_ngram: limits of the suffix."""

    num_draft_tokens: int = Field(default=8, ge=1, le=MAX_DRAFT_TOKENS)
    min_ngram: int = Field(default=2, ge=1)
    max_ngram: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> PromptLookupSettings:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} is above max_ngram {self.max_ngram}")
        return self


class PromptLookup(Drafter):
    kind = "prompt_lookup"
    nests = True
    Settings = PromptLookupSettings

    def __init__(self, name: str, settings: PromptLookupSettings) -> None:
        super().__init__(name, settings.num_draft_tokens)
        self.settings = settings
        self._rows = RowIndices(settings.max_ngram)

    def identity(self) -> dict[str, object]:
        return {**super().identity(), **self.settings.model_dump()}

    def trained_on(self) -> TrainedOn:
        return NOTHING

    def start(self, rows: Sequence[RowView]) -> None:
        self._rows.start(rows)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        return self._rows.prepare(row, max_tokens)

    def finish(self, rows: Sequence[RowView]) -> None:
        self._rows.finish(rows)

    def num_bytes(self) -> int:
        return self._rows.num_bytes()

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        min_ngram, most = self.settings.min_ngram, self.num_draft_tokens
        drafts: list[list[int]] = []
        for row, limit in zip(rows, limits, strict=True):
            match = self._rows.match_own(row)
            is_long = match.length >= min_ngram
            drafts.append(_copy(row.tokens, match.source, min(limit, most)) if is_long else [])
        return Drafts(*pad_drafts(drafts, torch.device("cpu")))


def _copy(tokens: Sequence[int], source: int, limit: int) -> list[int]:
    """Return up to `limit` tokens from `source` on, continued periodically after the text's end."""
    if limit < 1:
        return []
    copied = list(tokens[source : source + limit])
    period = len(tokens) - source
    while len(copied) < limit:
        copied.append(copied[len(copied) - period])
    return copied
