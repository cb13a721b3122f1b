"""The settings of a distillation: the strict schema of its flags, card and checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from paceline.config import Section


class DistillSettings(Section):
    """Settings of one distillation.

    max_prompts: cap on the prompts of every data file, or per file by its name without suffix; prompts
    with the lowest hashes of their ids are used. prompt_weight: of a prompt's token in the loss, where
    an answer's token has weight 1. batch_tokens: padded tokens per batch.
    """

    size: Literal["small", "medium"] = "small"
    embedding_init: Literal["svd", "random"] = "svd"
    max_prompts: int | dict[str, int] | None = None
    max_new_tokens: int = Field(default=256, ge=1)
    outputs: Path = Path("runs/outputs")
    validation_share: float = Field(default=0.04, gt=0.0, lt=1.0)
    prompt_weight: float = Field(default=0.2, ge=0.0, le=1.0)
    epochs: float = Field(default=8.0, gt=0.0)
    batch_tokens: int = Field(default=2048, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0.0)
    final_learning_rate: float = Field(default=0.02, ge=0.0, le=1.0)  # share of the peak
    warmup_share: float = Field(default=0.03, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=0.05, ge=0.0)
    max_gradient_norm: float = Field(default=1.0, gt=0.0)
    autocast: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the saved weights
    validate_every: float = Field(default=0.5, gt=0.0)  # epochs
    checkpoint_every: int = Field(default=200, ge=1)  # steps
    threads: int | None = Field(default=None, ge=1)
    seed: int = 0
    license: str = "apache-2.0"  # of the weights, for the card

    def cap_of(self, name: str) -> int | None:
        """Return the cap on the prompts of a data file, by its name without suffix."""
        if isinstance(self.max_prompts, dict):
            return self.max_prompts.get(name)
        return self.max_prompts
