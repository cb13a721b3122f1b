"""Sequence-level distillation: next-token cross-entropy on text that the target wrote.

Kim & Rush 2016 (arXiv 1606.07947), with target-generated data for drafters as in arXiv 2403.00858.
The loss on greedy answers is a proxy for the match rate: the share of positions where the student's
argmax is the target's token, which is its acceptance under greedy verification. A killed run
continues from its checkpoint to the same weights. Knows no target, tokenizer or store.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from paceline.distillation.batches import Batch, Example, collate, in_order, pack_epoch
from paceline.distillation.head import losses_and_matches, weighted_cross_entropy
from paceline.errors import ConfigError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.distillation.settings import DistillSettings


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """One step of a distillation. `match_rate` is the last validation's mean over domains."""

    phase: str  # decode | train
    step: int
    total: int
    loss: float = math.nan
    match_rate: float = math.nan


@dataclass(frozen=True, slots=True)
class DomainQuality:
    """The validation of a student on one domain's answers."""

    loss: float  # nats per token
    match_rate: float  # greedy acceptance per position
    num_tokens: int


@dataclass(slots=True)
class Training:
    """The state of a run; all of it is in the checkpoint."""

    step: int = 0
    loss: float = math.nan  # smoothed over about twenty steps
    seconds: float = 0.0  # wall-clock
    cpu_seconds: float = 0.0  # of all threads, independent of other work on the machine
    best_step: int = -1
    best_match: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_match(self) -> float:
        """The last validation's mean match rate, NaN before the first."""
        return self.history[-1]["match_rate"] if self.history else math.nan


def train(
    student: PreTrainedModel,
    examples: Sequence[Example],
    validation: Sequence[Example],
    settings: DistillSettings,
    checkpoint: Path,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Training:
    """Train a student in place up to the weights of its best validation; return the run's state.

    Deterministic: batches are a function of (seed, epoch). Raises ConfigError if `checkpoint` belongs
    to another run or cannot be read, or if there is no validation text.
    """
    plan = plan_batches(examples, settings)
    optimizer = _optimizer(student, settings)
    made_for = _signature(student, examples, settings)
    training = _resume(checkpoint, made_for, student, optimizer)
    every = max(1, round(settings.validate_every * len(plan) / settings.epochs))
    clock, cpu_clock = time.perf_counter(), time.process_time()
    while training.step < len(plan):
        batch = collate([examples[i] for i in plan[training.step]], settings.prompt_weight)
        rate = learning_rate(training.step, len(plan), settings)
        loss = _update(student, optimizer, batch, rate, settings)
        previous = training.loss if training.step else loss
        training.loss = 0.95 * previous + 0.05 * loss
        training.step += 1
        if training.step % every == 0 or training.step == len(plan):
            _validate(student, validation, training)
        if training.step % settings.checkpoint_every == 0 or training.step == len(plan):
            now, cpu_now = time.perf_counter(), time.process_time()
            training.seconds += now - clock
            training.cpu_seconds += cpu_now - cpu_clock
            clock, cpu_clock = now, cpu_now
            _save(checkpoint, made_for, student, optimizer, training)
        figures = training.loss, training.last_match
        on_progress(TrainingProgress("train", training.step, len(plan), *figures))
    student.load_state_dict(training.best_weights)
    student.eval()
    return training


def plan_batches(examples: Sequence[Example], settings: DistillSettings) -> list[list[int]]:
    """Return the batches of all epochs as text indices; the last epoch may be a part of one."""
    # the last token is not an input
    lengths = [len(example.tokens) - 1 for example in examples]
    plan: list[list[int]] = []
    for epoch in range(math.ceil(settings.epochs)):
        batches = pack_epoch(lengths, settings.batch_tokens, settings.seed, epoch)
        share = min(1.0, settings.epochs - epoch)
        plan += batches[: max(1, round(share * len(batches)))]
    return plan


def learning_rate(step: int, total: int, settings: DistillSettings) -> float:
    """Return a step's rate: a linear warm-up, then a half cosine down to its final share."""
    warmup = round(settings.warmup_share * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    low = settings.final_learning_rate
    share = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * share


def _optimizer(student: PreTrainedModel, settings: DistillSettings) -> torch.optim.AdamW:
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def hidden_states(student: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the final hidden states [n, D] at the batch's places."""
    states = student.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return states.flatten(0, 1)[batch.places]


def _update(
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    settings: DistillSettings,
) -> float:
    """Update the weights once at a learning rate; return the batch's weighted mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    student.train()
    dtype = torch.bfloat16 if settings.autocast else torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast):
        hidden = hidden_states(student, batch)
    head = student.get_output_embeddings().weight
    weights = batch.weights / batch.weights.sum()
    loss = weighted_cross_entropy(hidden.float(), head, batch.targets, weights, dtype)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_gradient_norm)
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def measure_quality(
    student: PreTrainedModel, examples: Sequence[Example]
) -> dict[str, DomainQuality]:
    """Return the quality per domain, on the target's output tokens only."""
    student.eval()
    head = student.get_output_embeddings().weight
    sums: dict[str, list[float]] = {}
    for members in in_order([len(e.tokens) for e in examples], 4096):
        batch = collate([examples[i] for i in members], prompt_weight=0.0)
        hidden = hidden_states(student, batch)
        losses, matches = losses_and_matches(hidden.to(head.dtype), head, batch.targets)
        for place, i in enumerate(members):
            own = batch.examples == place
            total = sums.setdefault(examples[i].domain, [0.0, 0, 0])
            total[0] += losses[own].double().sum().item()
            total[1] += int(matches[own].sum())
            total[2] += int(own.sum())
    return {
        domain: DomainQuality(loss / n, match / n, int(n))
        for domain, (loss, match, n) in sorted(sums.items())
        if n
    }


def _validate(student: PreTrainedModel, validation: Sequence[Example], training: Training) -> None:
    by_domain = measure_quality(student, validation)
    if not by_domain:
        raise ConfigError(
            "no prompt is in the validation part; give more data or a larger validation_share"
        )
    # every domain has the same weight, whatever its number of tokens
    match = sum(q.match_rate for q in by_domain.values()) / len(by_domain)
    training.history.append(
        {
            "step": training.step,
            "train_loss": round(training.loss, 4),
            "match_rate": round(match, 4),
            "domains": {
                d: {"loss": round(q.loss, 4), "match_rate": round(q.match_rate, 4)}
                for d, q in by_domain.items()
            },
        }
    )
    if match > training.best_match:
        training.best_match, training.best_step = match, training.step
        training.best_weights = {k: v.clone() for k, v in student.state_dict().items()}


def _signature(
    student: PreTrainedModel, examples: Sequence[Example], settings: DistillSettings
) -> str:
    """Return a hash of the settings, texts and student's shapes that a checkpoint depends on."""
    relevant = settings.model_dump_json(
        exclude={"outputs", "threads", "checkpoint_every", "license", "dtype", "max_prompts"}
    )
    digest = hashlib.sha256(relevant.encode())
    for example in examples:
        digest.update(example.id.encode() + example.tokens.tobytes())
    for name, weight in student.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
    return digest.hexdigest()[:16]


def _save(
    path: Path,
    made_for: str,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    training: Training,
) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "made_for": made_for,
            "student": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "training": {name: getattr(training, name) for name in Training.__slots__},
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def _resume(
    path: Path, made_for: str, student: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> Training:
    """Return the state of a killed run after loading its weights, or a new state.

    Raises ConfigError if the checkpoint cannot be read or belongs to another run.
    """
    if not path.exists():
        return Training()
    try:
        saved = torch.load(path, weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read; delete it to train from the start") from error
    if saved["made_for"] != made_for:
        raise ConfigError(
            f"{path}: this unfinished run has other settings or other texts; use those, or delete the "
            "file to train from the start"
        )
    student.load_state_dict(saved["student"])
    optimizer.load_state_dict(saved["optimizer"])
    return Training(**saved["training"])
