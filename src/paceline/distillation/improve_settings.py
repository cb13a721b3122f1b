"""The settings of a drafter's improvement: those of a distillation, with other defaults."""

from __future__ import annotations

from typing import Final

from pydantic import Field, model_validator

from paceline.distillation.settings import DistillSettings

OF_A_NEW_DRAFTER: Final = (
    "size",
    "shape",
    "architecture",
    "start_from",
    "target_layers",
    "target_encoder_layers",
    "embedding_init",
    "pretrain_text",
    "pretrain_tokens",
    "text_share",
    "license",
    "dtype",
)
"""The settings that an improvement does not have: the drafter has its own."""

OF_THE_COURSE: Final = (
    "epochs",
    "batch_tokens",
    "learning_rate",
    "final_learning_rate",
    "warmup_share",
    "validate_every",
    "validation_share",
)
"""The settings whose value for a new drafter does not suit an improvement."""


class ImproveSettings(DistillSettings):
    """Settings of one improvement.

    held_out: share of the log's conversations that judge the drafter before and after. least_held_out:
    their minimum number. validation_share: of the other conversations, which choose among the weights
    of a training. data_share: share of the training tokens that answers of `data` may have, so that the
    drafter keeps what it knows. Others are those of `DistillSettings`.
    """

    held_out: float = Field(default=0.2, gt=0.0, lt=1.0)
    least_held_out: int = Field(default=20, ge=2)
    data_share: float = Field(default=0.5, ge=0.0, lt=1.0)

    validation_share: float = Field(default=0.1, gt=0.0, lt=1.0)
    epochs: float = Field(default=3.0, gt=0.0)
    batch_tokens: int = Field(default=512, ge=1)  # a log is small, and needs steps
    learning_rate: float = Field(default=3e-4, gt=0.0)
    warmup_share: float = Field(default=0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _check_student(self) -> ImproveSettings:
        for name in OF_A_NEW_DRAFTER:
            if name in self.model_fields_set:
                raise ValueError(
                    f"'{name}' is of a new drafter, and this one has its own; remove it"
                )
        return self
