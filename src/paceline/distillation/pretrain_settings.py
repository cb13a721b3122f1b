"""The settings of a model's training from pairs: those of a distillation that need no target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, model_validator

from paceline.distillation.settings import Architecture, DistillSettings, StudentShape

OF_A_TARGET: Final = (
    "size",
    "start_from",
    "target_layers",
    "target_encoder_layers",
    "embedding_init",
    "pretrain_text",
    "pretrain_tokens",
    "max_new_tokens",
    "samplings",
    "outputs",
    "answers_drafter",
    "text_share",
    "loss",
    "teacher",
    "teacher_top_k",
    "teacher_temperature",
)
"""The settings that need a target, or text without prompts."""


class PretrainSettings(DistillSettings):
    """Settings of one training from scratch, on prompts with their references.

    tokenizer: folder of the model's tokenizer. chat_template: whether prompts are read, and the
    tokenizer saved, with its chat template if it has one. architecture and shape: of the model.
    context: tokens that a prompt and its reference may have together; longer ones are left out. The
    references are learned by cross-entropy, and the weights with the least loss on validation prompts
    are kept. Others are those of `DistillSettings`.
    """

    tokenizer: Path
    chat_template: bool = True
    architecture: Architecture = "t5"
    shape: StudentShape
    context: Annotated[int, Field(ge=2)] = 1024

    @model_validator(mode="after")
    def _check_target(self) -> PretrainSettings:
        for name in OF_A_TARGET:
            if name in self.model_fields_set:
                raise ValueError(
                    f"'{name}' is of a training with a target, and this one has none; remove it"
                )
        return self
