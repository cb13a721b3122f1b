"""The steps of a training in advance: which batches, at which learning rate. Knows no model.

All of it is a function of the texts' lengths and the settings, so a resumed run makes the same steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.distillation.batches import pack_epoch, total_weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.distillation.batches import Example
    from paceline.distillation.settings import DistillSettings


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The batches of one update, as indices of texts, and the sum of their weights in the loss."""

    of_answers: bool  # else of the pre-training text
    batches: list[list[int]]
    weight: float


def plan_steps(
    answers: Sequence[Example],
    texts: Sequence[Example],
    settings: DistillSettings,
    batches_per_step: int,
    has_encoder: bool = False,
) -> list[PlannedStep]:
    """Return the steps of the alignment: `epochs` passes over the answers, mixed with text.

    batches_per_step: accumulated batches times processes. has_encoder: whether the student has one.
    Steps of text are spread evenly at the stated share; the text starts again where it is too short.
    """
    weights = [total_weight(example, settings.prompt_weight) for example in answers]
    steps = _steps(
        _batches(answers, settings, settings.epochs, has_encoder), weights, True, batches_per_step
    )
    if not settings.text_share:
        return steps
    wanted = round(len(steps) * settings.text_share / (1 - settings.text_share))
    of_text = plan_text(texts, wanted, settings, batches_per_step, has_encoder)
    mixed: list[PlannedStep] = []
    for i, step in enumerate(steps):
        mixed += of_text[i * wanted // len(steps) : (i + 1) * wanted // len(steps)]
        mixed.append(step)
    return mixed


def plan_text(
    texts: Sequence[Example],
    num_steps: int,
    settings: DistillSettings,
    batches_per_step: int,
    has_encoder: bool = False,
) -> list[PlannedStep]:
    """Return steps of text, in as many passes as they need. The prompts of pairs are not learned."""
    weights = [total_weight(text, 0.0) for text in texts]
    steps: list[PlannedStep] = []
    epoch = 0
    while len(steps) < num_steps:
        batches = _epoch(texts, settings, epoch, has_encoder)
        steps += _steps(batches, weights, False, batches_per_step)
        epoch += 1
    return steps[:num_steps]


def _epoch(
    texts: Sequence[Example], settings: DistillSettings, epoch: int, has_encoder: bool
) -> list[list[int]]:
    # the last token is not an input, but a decoder has a start token in addition
    lengths = [len(text.tokens) - 1 + has_encoder for text in texts]
    sources = [text.num_prompt for text in texts] if has_encoder else None
    return pack_epoch(lengths, settings.batch_tokens, settings.seed, epoch, sources)


def _batches(
    texts: Sequence[Example], settings: DistillSettings, epochs: float, has_encoder: bool
) -> list[list[int]]:
    """Return the batches of all epochs; the last epoch may be a part of one."""
    batches: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        whole = _epoch(texts, settings, epoch, has_encoder)
        share = min(1.0, epochs - epoch)
        batches += whole[: max(1, round(share * len(whole)))]
    return batches


def _steps(
    batches: list[list[int]], weights: list[float], of_answers: bool, batches_per_step: int
) -> list[PlannedStep]:
    steps = []
    for first in range(0, len(batches), batches_per_step):
        part = batches[first : first + batches_per_step]
        weight = sum(weights[i] for batch in part for i in batch)
        steps.append(PlannedStep(of_answers, part, weight))
    return steps


def learning_rate(step: int, total: int, settings: DistillSettings) -> float:
    """Return a step's rate: a linear warm-up, then a half cosine down to its final share."""
    warmup = round(settings.warmup_share * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    low = settings.final_learning_rate
    share = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * share
