"""The texts of a distillation: the target's answers, validation answers, and plain text.

Decodes the answers that are missing. Knows no student.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from paceline.assembly.pace import encode_prompt
from paceline.distillation.card import read_sources
from paceline.distillation.outputs import (
    answered_prompts,
    decode_outputs,
    open_outputs,
    read_examples,
)
from paceline.distillation.prompts import choose_prompts
from paceline.distillation.reading import fits, longest_text
from paceline.distillation.settings import AnswerSampling
from paceline.distillation.texts import learned_prompts, read_pairs, read_texts
from paceline.errors import ConfigError
from paceline.models.encoder_decoder import is_encoder_decoder
from paceline.store import TrainedOn

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from paceline.assembly import Pace
    from paceline.contracts import Progress, PromptRecord
    from paceline.distillation.batches import Example
    from paceline.distillation.card import PromptSource
    from paceline.distillation.prompts import PromptFile
    from paceline.distillation.settings import DistillSettings, LossName

_GREEDY = (AnswerSampling(),)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A prompt file and the target's answers to its prompts."""

    name: str
    folder: Path  # of the answers
    training: list[Example]
    validation: list[Example]
    sources: list[PromptSource]
    answered: list[PromptRecord]  # the prompts of `training`
    num_left_out: int  # prompts without an answer

    def learned_by(self, loss: LossName) -> list[Example]:
        """Return the texts whose distributions are needed: cross-entropy learns from the text alone."""
        return self.validation if loss == "cross_entropy" else [*self.training, *self.validation]


@dataclass(frozen=True, slots=True)
class TrainingTexts:
    """The texts of a distillation. measured: files of other tasks, of which only validation is used."""

    files: list[DataFile]
    measured: list[DataFile]
    plain: list[Example] = field(default_factory=list)  # pre-training text
    trained_on: TrainedOn = field(default_factory=lambda: TrainedOn.of([]))

    @property
    def training(self) -> list[Example]:
        """The answers to train on, of all files."""
        return [e for file in self.files for e in file.training]

    @property
    def validation(self) -> list[Example]:
        """The answers to validate on, of the files that are trained on."""
        return [e for file in self.files for e in file.validation]

    @property
    def notes(self) -> list[str]:
        """Notes for the user on prompts that were left out."""
        return [
            f"{file.name}: {file.num_left_out} prompts were left out, which fill the context or have "
            "no answer"
            for file in self.files
            if file.num_left_out
        ]

    @property
    def unseen(self) -> list[Example]:
        """The validation answers of all files."""
        return [e for file in (*self.files, *self.measured) for e in file.validation]


def prepare_texts(
    pace: Pace,
    data: Sequence[Path],
    also_measure: Sequence[Path],
    settings: DistillSettings,
    on_progress: Progress,
    student: PreTrainedModel | None = None,
) -> TrainingTexts:
    """Return the texts of a distillation after decoding the missing answers.

    student: reads the text for pre-training, which is cut at its context if that is shorter than the
    target's.
    Raises ConfigError without a text to train or to validate on, or for a file that cannot be read;
    StoreError for answers of another target.
    """
    chosen = choose_prompts(data, settings, also_measure)
    files = [_answer(pace, file, settings, on_progress) for file in chosen.files]
    measured = [_answer(pace, file, settings, on_progress) for file in chosen.measured]
    plain: list[Example] = []
    learned = [record.prompt for file in files for record in file.answered]
    if settings.pretrain_text:
        plain = _read_plain(pace, files, settings, chosen.may_learn, student)
        learned += learned_prompts(settings.pretrain_text, chosen.may_learn)
    texts = TrainingTexts(files, measured, plain, TrainedOn.of(learned))
    if not texts.training or not texts.validation:
        raise ConfigError(
            f"{len(texts.training)} answers to train on and {len(texts.validation)} to validate on: "
            "both are needed; give more prompts or another validation_share"
        )
    return texts


def _answer(
    pace: Pace, file: PromptFile, settings: DistillSettings, on_progress: Progress
) -> DataFile:
    """Return a file's answers, after decoding the missing ones."""
    folder = settings.outputs / file.name
    store = open_outputs(pace, folder, settings.max_new_tokens)

    def decode(prompts: list[PromptRecord], samplings: Sequence[AnswerSampling]) -> None:
        decode_outputs(
            pace,
            prompts,
            samplings,
            store,
            settings.max_new_tokens,
            settings.answers_drafter,
            on_done=partial(on_progress, f"answers {file.name}"),
        )

    decode(file.training, settings.samplings)
    decode(file.validation, _GREEDY)
    training = read_examples(store, file.training, settings.samplings)
    validation = read_examples(store, file.validation, _GREEDY)
    answered = answered_prompts(training, file.training, settings.samplings)
    left_out = len(file.training) - len(answered) + len(file.validation) - len(validation)
    sources = read_sources(file.path)
    return DataFile(file.name, folder, training, validation, sources, answered, left_out)


def check_lengths(student: PreTrainedModel, texts: TrainingTexts) -> None:
    """Raise ConfigError if a text is longer than the student's context."""
    examples = [*texts.training, *texts.unseen]
    if too_long := sum(not fits(student, example) for example in examples):
        raise ConfigError(
            f"{too_long} of {len(examples)} texts are longer than the student's context of "
            f"{longest_text(student)} tokens, the longest has "
            f"{max(len(example.tokens) - 1 for example in examples)}; start from a student with a "
            "longer context, or lower max_new_tokens and leave out long prompts"
        )


def _read_plain(
    pace: Pace,
    files: Sequence[DataFile],
    settings: DistillSettings,
    may_learn: TrainedOn,
    student: PreTrainedModel | None,
) -> list[Example]:
    """Return the tokens of text that pre-training or the mixture needs, whichever are more."""
    models = [model for model in (pace.parts.target.model, student) if model is not None]
    context = min(map(longest_text, models))
    has_encoder = student is not None and is_encoder_decoder(student)
    answers = sum(len(e.tokens) for file in files for e in file.training) * settings.epochs
    mixed = math.ceil(answers * settings.text_share / (1 - settings.text_share))
    num_tokens = max(settings.pretrain_tokens, mixed)
    files_of_text, seed = settings.pretrain_text, settings.seed
    if not has_encoder:
        return read_texts(files_of_text, pace.encode, context, num_tokens, seed, may_learn)
    encode = PairEncoder(pace.parts.tokenizer, pace.stop_token_ids())
    return read_pairs(files_of_text, encode, context, num_tokens, seed, may_learn)


@dataclass(frozen=True, slots=True)
class PairEncoder:
    """The token ids of prompts, as the target reads them, and of references with an answer's end."""

    tokenizer: Any
    ends: Collection[int]  # ids that end an answer

    def __call__(self, prompt: str, reference: str) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and of its reference."""
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        message = {"role": "user", "content": prompt}
        output = self.tokenizer(reference, add_special_tokens=False)["input_ids"]
        own = self.tokenizer.eos_token_id
        end = [own] if own in self.ends else sorted(self.ends)[:1]
        return list(encode_prompt(self.tokenizer, [message] if has_template else prompt)), [
            *output,
            *end,
        ]
