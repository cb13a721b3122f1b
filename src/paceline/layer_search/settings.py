"""What a search is asked; its budget (trials, minutes) is not part of it, so it may be prolonged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from paceline.drafting.draft_length import ThresholdSettings
from paceline.drafting.layer_skip import LayerSkipSettings


class SearchSettings(ThresholdSettings):
    """How the drafter will stop, what is minimised, and on how much text.

    objective: `predicted` prices acceptance with a cost table, so it is repeatable; `measured` times
    real decoding. max_new_tokens: the length of each development answer.
    """

    num_draft_tokens: int = Field(default=12, ge=1, le=64)
    stop: Literal["threshold", "fixed"] = "threshold"
    objective: Literal["predicted", "measured"] = "predicted"
    max_new_tokens: int = Field(default=64, ge=3)
    seed: int = 0

    def of_drafter(self) -> LayerSkipSettings:
        """The same exit and length as the drafter's own settings; what it skips is said elsewhere."""
        shared = set(LayerSkipSettings.model_fields) & set(SearchSettings.model_fields)
        return LayerSkipSettings(skip_mlp=(0,), **self.model_dump(include=shared))
