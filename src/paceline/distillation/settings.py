"""The settings of a distillation: the strict schema of its flags, configuration section and card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator

from paceline.config import Section
from paceline.contracts import GREEDY, SamplingParams
from paceline.requests.values import MIN_TEMPERATURE
from paceline.store.records import sampling_label

LossName = Literal[
    "cross_entropy",
    "kl",
    "reverse_kl",
    "jensen_shannon",
    "tvd",
    "tvd++",
    "tvd++_position",
    "negative_log_acceptance",
    "lk_hybrid",
]


Cap = Annotated[int, Field(ge=0)]
Layers = tuple[Annotated[int, Field(ge=0)], ...]


class StudentShape(Section):
    """The sizes of a student, which decide its speed.

    num_layers: over its text, which are the decoder's of a student with an encoder. num_kv_heads: by
    default as many as num_heads. num_encoder_layers: by default as many as num_layers; a causal
    student has none.
    """

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    mlp_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    num_encoder_layers: int | None = Field(default=None, ge=1)

    @property
    def encoder_layers(self) -> int:
        """The layers of the encoder of a student that has one."""
        return self.num_encoder_layers or self.num_layers

    @model_validator(mode="before")
    @classmethod
    def _share_no_heads(cls, given: Any) -> Any:
        if isinstance(given, dict) and "num_heads" in given:
            return {"num_kv_heads": given["num_heads"], **given}
        return given

    @model_validator(mode="after")
    def _check_heads(self) -> StudentShape:
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not an even number times num_heads {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        return self


def _shape(
    layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, encoder_layers: int | None = None
) -> StudentShape:
    return StudentShape(
        num_layers=layers,
        hidden_size=hidden,
        mlp_size=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        num_encoder_layers=encoder_layers,
    )


Architecture = Literal["llama", "t5"]
# an encoder runs once per request and its depth costs a drafted token nothing
SHAPES: Final[dict[Architecture, dict[str, StudentShape]]] = {
    "llama": {"small": _shape(2, 128, 384, 4, 2), "medium": _shape(3, 256, 640, 4, 2)},
    "t5": {"small": _shape(1, 128, 256, 4, 4, 2), "medium": _shape(2, 256, 640, 4, 4, 3)},
}


class AnswerSampling(Section):
    """The sampling of one answer per prompt. The default, temperature 0, is greedy."""

    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _check(self) -> AnswerSampling:
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature:g} is neither 0 (greedy) nor at least "
                f"{MIN_TEMPERATURE:g}"
            )
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(
                f"top_p {self.top_p:g} has no effect at temperature 0, which is greedy; set a "
                "temperature above 0 or remove it"
            )
        return self

    def params(self) -> SamplingParams:
        """Return the sampling of a request, before it has a seed."""
        if self.temperature == 0:
            return GREEDY
        return SamplingParams(self.temperature, top_p=self.top_p, method="invariant")


class DistillSettings(Section):
    """Settings of one distillation.

    Student. size: a named shape; `shape`: another one; architecture: of a new student; `auto` is a T5
    for a target with an encoder and a Llama for others. `start_from`: the folder of a model to train
    further; `target_layers`: layers of the target that the student copies, with the target's width and
    embedding; of a target with an encoder they are the decoder's, and `target_encoder_layers` the
    encoder's, by default all. embedding_init: of a student from scratch.

    Phase 1. pretrain_text: files of text, see `texts`; of a student with an encoder, of prompts with
    references, which are its labels. pretrain_tokens: tokens of it to learn before the answers, 0 skips
    the phase.

    Phase 2. part: `training` leaves out the prompts that are kept for collecting and judging (see
    `store.splits`), `all` uses every prompt. max_prompts: cap on the prompts of every data file, or per
    file by its name without suffix; prompts with the lowest hashes of their ids are used. samplings:
    each prompt is answered once with each; validation prompts are answered greedily. outputs: folder of
    the answers, which several distillations share. answers_drafter: the configured drafter that speeds
    up answering, or `none`; by default a suffix lookup, and `none` where that does not pay by the clock.
    The answers are the target's own with any drafter.

    Phase 3. text_share: share of the steps that learn `pretrain_text` instead of answers. loss: see
    `losses`. teacher: `cached` reads the target's `teacher_top_k` largest probabilities per position
    from `outputs`, `live` runs the target on each batch and uses all probabilities.
    teacher_temperature: of the target's distribution. prompt_weight: of a prompt's token in the loss,
    where an answer's token has weight 1; it is 0 if the target or the student reads prompts by an
    encoder. batch_tokens: padded tokens per batch; accumulate: batches per step. ema_decay: of the
    moving average of the weights, which is validated and saved; 0 has none. autocast: products in
    bfloat16; by default where the device has instructions for them, since they are slow elsewhere.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    size: Literal["small", "medium"] = "small"
    shape: StudentShape | None = None
    architecture: Literal["auto"] | Architecture = "auto"
    start_from: Path | None = None
    target_layers: Layers | None = Field(default=None, min_length=1)
    target_encoder_layers: Layers | None = Field(default=None, min_length=1)
    embedding_init: Literal["svd", "random"] = "svd"

    pretrain_text: tuple[Path, ...] = ()
    pretrain_tokens: int = Field(default=0, ge=0)

    part: Literal["training", "all"] = "training"
    max_prompts: Cap | dict[str, Cap] | None = None
    max_new_tokens: int = Field(default=256, ge=1)
    samplings: tuple[AnswerSampling, ...] = Field(default=(AnswerSampling(),), min_length=1)
    outputs: Path = Path("runs/outputs")
    answers_drafter: str | None = None
    validation_share: float = Field(default=0.04, gt=0.0, lt=1.0)

    text_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    loss: LossName = "cross_entropy"
    teacher: Literal["cached", "live"] = "cached"
    teacher_top_k: int = Field(default=32, ge=1)
    teacher_temperature: float = Field(default=1.0, ge=MIN_TEMPERATURE)
    prompt_weight: float = Field(default=0.2, ge=0.0, le=1.0)
    epochs: float = Field(default=8.0, gt=0.0)
    batch_tokens: int = Field(default=2048, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0.0)
    final_learning_rate: float = Field(default=0.02, ge=0.0, le=1.0)  # share of the peak
    warmup_share: float = Field(default=0.03, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=0.05, ge=0.0)
    max_gradient_norm: float = Field(default=1.0, gt=0.0)
    ema_decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    autocast: bool | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the saved weights
    validate_every: float = Field(default=0.5, gt=0.0)  # epochs
    checkpoint_every: int = Field(default=200, ge=1)  # steps
    events: Path | None = Path("runs/events")
    threads: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    license: str = "apache-2.0"  # of the weights, for the card

    @model_validator(mode="after")
    def _check_text(self) -> DistillSettings:
        if (self.pretrain_tokens or self.text_share) and not self.pretrain_text:
            raise ValueError(
                "'pretrain_tokens' and 'text_share' need files of text; name them in 'pretrain_text'"
            )
        return self

    @field_validator("samplings")
    @classmethod
    def _check_samplings(cls, samplings: tuple[AnswerSampling, ...]) -> tuple[AnswerSampling, ...]:
        labels = [sampling_label(sampling.params()).removeprefix("@") for sampling in samplings]
        twice = sorted({label or "greedy" for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(
                f"'{twice[0]}' is given twice, and a prompt is answered once with each; remove one"
            )
        return samplings

    def cap_of(self, name: str) -> int | None:
        """Return the cap on the prompts of a data file, by its name without suffix."""
        if isinstance(self.max_prompts, dict):
            return self.max_prompts.get(name)
        return self.max_prompts


AnySettings = TypeVar("AnySettings", bound=DistillSettings)


class DistillationSection(DistillSettings):
    """The section `distillation` of a configuration: a whole distillation.

    data: prompt files to train on; measure: prompt files of other tasks, whose validation prompts are
    measured as well; out: the folder of the drafter.
    """

    data: tuple[Path, ...] = ()
    measure: tuple[Path, ...] = ()
    out: Path | None = None

    def settings(self) -> DistillSettings:
        """Return the settings alone."""
        own = self.model_dump(exclude={"data", "measure", "out"}, exclude_unset=True)
        return DistillSettings.model_validate(own)
