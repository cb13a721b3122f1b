"""A student's figures along the target's answers, position by position: one forward per text, no rounds.

Greedy acceptance of a chain depends on the text alone, so rounds are counted later (`measures`).
Knows no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.distillation.batches import collate, in_order
from paceline.distillation.measures import AnswerMatches
from paceline.distillation.objective import judge
from paceline.distillation.reading import hidden_states, output_scale
from paceline.distillation.teachers import TextTeacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from paceline.distillation.batches import Example
    from paceline.distillation.teachers import Teacher
    from paceline.distillation.train import Distributions

_BATCH_TOKENS: Final = 4096  # padded


@dataclass(frozen=True, slots=True)
class TextReplay:
    """A student's figures at the answer's positions of one validation text."""

    example: Example
    losses: torch.Tensor  # [n] nats
    matches: torch.Tensor  # [n] bool, whether its greedy token is the target's
    accepted: torch.Tensor  # [n] sum min(p, q)


@torch.inference_mode()
def replay_validation(
    student: PreTrainedModel, examples: Sequence[Example], distributions: Distributions | None
) -> list[TextReplay]:
    """Return a student's figures on the answers of each text, in the order of `examples`.

    Without distributions, `accepted` is the student's probability of the target's token.
    """
    student.eval()
    head = student.get_output_embeddings().weight
    scale = output_scale(student)
    found: dict[int, TextReplay] = {}
    for members in in_order([len(e.tokens) for e in examples], _BATCH_TOKENS):
        part = [examples[i] for i in members]
        batch = collate(part, prompt_weight=0.0).to(student.device)
        teacher: Teacher = TextTeacher(batch.targets)
        if distributions is not None:
            teacher = distributions.teacher(batch, part)
        hidden = hidden_states(student, batch) * scale
        figures = judge(hidden.to(head.dtype), head, batch.targets, teacher)
        for place, i in enumerate(members):
            own = batch.examples == place
            found[i] = TextReplay(
                examples[i],
                figures.losses[own].cpu(),
                figures.matches[own].cpu(),
                figures.accepted[own].cpu(),
            )
    return [found[i] for i in range(len(examples))]


def matches_of(replays: Sequence[TextReplay]) -> AnswerMatches:
    """Return the matches of replayed texts, whose tasks are their domains."""
    return AnswerMatches.of(
        [r.matches.numpy() for r in replays],
        [r.example.domain for r in replays],
        [r.accepted.numpy() for r in replays],
    )


def with_losses(figures: dict[str, Any], replays: Sequence[TextReplay]) -> dict[str, Any]:
    """Return a history entry's figures with the loss per task, nats per token, and its mean."""
    by_task: dict[str, list[torch.Tensor]] = {}
    for replay in replays:
        by_task.setdefault(replay.example.domain, []).append(replay.losses)
    losses = {task: float(torch.cat(own).double().mean()) for task, own in by_task.items()}
    for task, loss in losses.items():
        figures["domains"][task]["loss"] = round(loss, 4)
    return {**figures, "loss": round(sum(losses.values()) / len(losses), 4)}
