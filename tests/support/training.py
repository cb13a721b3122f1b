"""Students, texts and settings that train in a second, and the functions that end a training early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.distillation.batches import Example, collate
from paceline.distillation.distributions import LiveDistributions
from paceline.distillation.replays import replay_validation
from paceline.distillation.settings import StudentShape
from paceline.distillation.student import build_student
from paceline.distillation.teachers import LiveTeacher
from paceline.distillation.train import Lesson, Trainer, start_accelerator
from support.distillation import VOCAB, KilledError, tiny_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import LlamaForCausalLM, PreTrainedModel

    from paceline.assembly import Pace
    from paceline.distillation.batches import Batch
    from paceline.distillation.checkpoints import Training
    from paceline.distillation.settings import DistillSettings
    from paceline.distillation.train import TrainingProgress

TINY = StudentShape(num_layers=2, hidden_size=16, mlp_size=24, num_heads=2, num_kv_heads=1)


def new_student(seed: int = 0) -> LlamaForCausalLM:
    return build_student(tiny_target(), TINY, "random", seed)


def rule_texts(count: int, seed: int = 0, domain: str = "d", step: int = 7) -> list[Example]:
    """Return texts of a learnable rule: each token is the previous one and `step`."""
    random = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        num_prompt, num_output = int(random.integers(1, 6)), int(random.integers(1, 12))
        tokens = (random.integers(VOCAB) + step * np.arange(num_prompt + num_output)) % VOCAB
        examples.append(Example(f"{domain}/{i}", domain, tokens.astype(np.int64), num_prompt))
    return examples


class SmoothedText:
    """Distributions with nine tenths on the text's token and the rest on all tokens alike."""

    def teacher(self, batch: Batch, examples: Sequence[Example]) -> LiveTeacher:
        p = torch.nn.functional.one_hot(batch.targets, VOCAB) * 0.9 + 0.1 / VOCAB
        return LiveTeacher(p.log(), lambda hidden: hidden, 1.0, batch.tokens.device)


def trainer(
    student: PreTrainedModel,
    lesson: Lesson | Sequence[Example],
    settings: DistillSettings,
    checkpoint: Path,
    pretrain_tokens: int = 0,
) -> Trainer:
    """Return a trainer on the CPU. lesson: answers alone learn their own tokens."""
    if not isinstance(lesson, Lesson):
        lesson = Lesson(lesson)
    accelerator = start_accelerator(on_cpu=True)
    return Trainer(student, lesson, settings, checkpoint, accelerator, pretrain_tokens)


def score_by_loss(examples: Sequence[Example]) -> Callable[[PreTrainedModel], tuple[float, dict]]:
    """Return a validation whose score is the negative mean loss on texts."""

    def validate(student: PreTrainedModel) -> tuple[float, dict[str, Any]]:
        losses = torch.cat([r.losses for r in replay_validation(student, examples, None)])
        return -float(losses.mean()), {"loss": float(losses.mean())}

    return validate


def check_teacher(pace: Pace, lesson: Lesson, settings: DistillSettings) -> None:
    """Compare the distributions that a lesson learns with those of the target at its temperature."""
    assert lesson.distributions is not None
    examples = lesson.answers[:5]
    batch = collate(examples, settings.prompt_weight)
    ids, found = lesson.distributions.teacher(batch, examples).buckets(slice(None))
    target = LiveDistributions.of(pace.parts.target, settings.teacher_temperature)
    _, expected = target.teacher(batch, examples).buckets(slice(None))
    if ids is not None:  # the last bucket is of all other tokens
        found, expected = found[:, :-1], expected.gather(1, ids)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def without_speed(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a history without its only figure that depends on the clock."""
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in history]


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """Return whether two models of one configuration have the same bits."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(v, w) for (m, v), (n, w) in pairs)


def killer(step: int) -> Callable[[TrainingProgress], None]:
    """Return a report of progress that ends the training after a step."""

    def kill(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise KilledError

    return kill


def run(
    trained: Trainer,
    validation: Sequence[Example],
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Training:
    """Run a training that validates by the loss."""
    return trained.run(score_by_loss(validation), on_progress)
