"""Settings of a search, without its budget (trials, minutes), which a later run may extend."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from paceline.drafting.draft_length import ThresholdSettings
from paceline.drafting.layer_skip import LayerSkipSettings


class SearchSettings(ThresholdSettings):
    """The drafter's stop rule, the objective and the length of the development answers.

    objective: `predicted` prices acceptance with a cost table and is reproducible; `measured` times
    real decoding. max_new_tokens: the length of each development answer.
    """

    num_draft_tokens: int = Field(default=12, ge=1, le=64)
    stop: Literal["threshold", "fixed"] = "threshold"
    objective: Literal["predicted", "measured"] = "predicted"
    max_new_tokens: int = Field(default=64, ge=3)
    seed: int = 0

    def of_drafter(self) -> LayerSkipSettings:
        """Return a drafter's settings with this exit and length; its skip set is a placeholder."""
        shared = set(LayerSkipSettings.model_fields) & set(SearchSettings.model_fields)
        return LayerSkipSettings(skip_mlp=(0,), **self.model_dump(include=shared))
