"""Drafts copied from the text so far: what followed the longest earlier match of its suffix.

No model and no training; wins where the answer repeats the prompt or itself. Of equally long
matches the latest is taken. A match that reaches the end of the text is continued periodically, as
copying token by token would. After prompt lookup decoding (Saxena, 2023), with the match length
free up to `max_ngram` instead of tried from a short list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from paceline.contracts import Drafts
from paceline.drafting.base import Drafter, Foresight, pad_drafts
from paceline.drafting.foresight import SimulatedForesight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView


class PromptLookupSettings(BaseModel):
    """num_draft_tokens: most tokens a draft; min_ngram, max_ngram: bounds of the suffix matched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_draft_tokens: int = Field(default=8, ge=1, le=64)
    min_ngram: int = Field(default=2, ge=1)
    max_ngram: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> PromptLookupSettings:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} is above max_ngram {self.max_ngram}")
        return self


def longest_suffix_match(tokens: np.ndarray, min_ngram: int, max_ngram: int) -> int | None:
    """Where the text continues after the longest earlier occurrence of its own suffix.

    tokens: [n] integers. Returns an index below n, or None if no suffix of at least `min_ngram`
    tokens occurs earlier.
    """
    n = len(tokens)
    ends = np.flatnonzero(tokens[: n - 1] == tokens[n - 1])
    best = None
    for length in range(1, max_ngram + 1):
        if length >= min_ngram and len(ends):
            best = int(ends[-1]) + 1
        # extend every surviving match by one token to the left
        ends = ends[ends >= length]
        if not len(ends) or length >= n - 1:
            break
        ends = ends[tokens[ends - length] == tokens[n - 1 - length]]
    return best


class PromptLookup(Drafter):
    kind: ClassVar[str] = "prompt_lookup"
    Settings: ClassVar[type[BaseModel]] = PromptLookupSettings

    def __init__(self, name: str, settings: PromptLookupSettings) -> None:
        super().__init__(name, settings.num_draft_tokens)
        self.settings = settings

    def identity(self) -> dict[str, object]:
        return {**super().identity(), **self.settings.model_dump()}

    def draft(self, tokens: np.ndarray, limit: int) -> list[int]:
        """At most `limit` tokens that may follow `tokens` [n]."""
        limit = min(limit, self.num_draft_tokens)
        if limit < 1 or len(tokens) < 2:
            return []
        source = longest_suffix_match(tokens, self.settings.min_ngram, self.settings.max_ngram)
        if source is None:
            return []
        period = len(tokens) - source
        copied: list[int] = tokens[source : source + min(limit, period)].tolist()
        while len(copied) < limit:
            copied.append(copied[len(copied) - period])
        return copied

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        texts = [np.asarray(row.tokens, dtype=np.int64) for row in rows]
        drafts = [self.draft(text, limit) for text, limit in zip(texts, limits, strict=True)]
        return Drafts(*pad_drafts(drafts, torch.device("cpu")))

    def would_accept(
        self, prompt: Sequence[int], trajectory: Sequence[int], p: Tensor | None
    ) -> Foresight:
        return SimulatedForesight(self, prompt, trajectory)
