"""The training loop: a student learns the target's answers, or text.

Alignment follows arXiv 2403.00858: a loss between the target's and the student's distributions along
the target's own answers. What counts is not the loss but the acceptance, so the best weights are those
with the best score on validation texts. A killed run continues from its checkpoint to the same
weights. Runs on a CPU, a GPU or, started by `accelerate launch`, on several. Knows no tokenizer and no
store.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from paceline.distillation.batches import collate
from paceline.distillation.checkpoints import Checkpoint, Training, signature
from paceline.distillation.interrupts import deferred_interrupt
from paceline.distillation.objective import sliced_loss
from paceline.distillation.reading import hidden_states, output_scale
from paceline.distillation.schedule import learning_rate, plan_steps, plan_text
from paceline.distillation.teachers import TextTeacher
from paceline.errors import ConfigError
from paceline.models.compiled.processor import multiplies_bfloat16
from paceline.models.encoder_decoder import is_encoder_decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from paceline.distillation.batches import Batch, Example
    from paceline.distillation.objective import Totals
    from paceline.distillation.schedule import PlannedStep
    from paceline.distillation.settings import AnySettings, DistillSettings
    from paceline.distillation.teachers import Teacher

_SMOOTHING = 0.95  # of the reported loss, over about twenty steps


class DivergedError(ConfigError):
    """The loss or the gradient of a training is not finite."""


class Distributions(Protocol):
    """The target's distributions of any batch of answers."""

    def teacher(self, batch: Batch, examples: Sequence[Example]) -> Teacher:
        """Return those at the batch's learned positions."""
        ...


@dataclass(frozen=True, slots=True)
class Lesson:
    """The texts of one training, and the target's distributions along its answers.

    Cross-entropy learns the answers' own tokens instead; without distributions, every loss does.
    """

    answers: Sequence[Example]
    texts: Sequence[Example] = ()  # for pre-training
    distributions: Distributions | None = None


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """One step of a distillation. `figures` are those of the last validation."""

    phase: str  # measure student | answers NAME | distributions | pretrain | align
    step: int
    total: int
    loss: float = math.nan
    tokens_per_second: float = math.nan
    figures: dict[str, Any] | None = None


class Objective(nn.Module):
    """A student and the loss of a batch, as one module that can be spread over processes."""

    def __init__(self, student: PreTrainedModel, settings: DistillSettings) -> None:
        super().__init__()
        self.student = student
        self._settings = settings
        self._scale = output_scale(student)

    def forward(self, batch: Batch, teacher: Teacher, of_answers: bool) -> Totals:
        """Return the weighted sums over the batch."""
        settings = self._settings
        device = batch.tokens.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bool(settings.autocast)):
            hidden = hidden_states(self.student, batch)
        head = self.student.get_output_embeddings().weight
        dtype = torch.bfloat16 if settings.autocast else torch.float32
        loss = settings.loss if of_answers else "cross_entropy"
        hidden = hidden.float() * self._scale
        return sliced_loss(hidden, head, batch.weights, teacher, loss, dtype)


def start_accelerator(on_cpu: bool) -> Accelerator:
    """Return accelerate's view of the devices and processes. Raises ConfigError without accelerate."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ConfigError(
            "training needs accelerate; install it with: pip install 'paceline[train]'"
        ) from error
    return Accelerator(cpu=on_cpu)


def choose_arithmetic(settings: AnySettings, device: torch.device) -> AnySettings:
    """Return the settings with `autocast` decided: on where the device multiplies bfloat16 itself."""
    if settings.autocast is not None:
        return settings
    if device.type == "cuda":
        has_products = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_products = device.type == "cpu" and multiplies_bfloat16()
    return settings.model_copy(update={"autocast": has_products})


class Trainer:
    """One training of a student. `run` continues from the checkpoint, if there is one."""

    def __init__(
        self,
        student: PreTrainedModel,
        lesson: Lesson,
        settings: DistillSettings,
        checkpoint: Path,
        accelerator: Accelerator,
        pretrain_tokens: int = 0,
        phase: str = "align",
    ) -> None:
        """pretrain_tokens: learn this number of tokens of text alone, instead of the answers.

        phase: the name of a training of answers.
        """
        settings = choose_arithmetic(settings, accelerator.device)
        self.student, self.lesson, self.settings = student, lesson, settings
        self.accelerator = accelerator
        self.phase = "pretrain" if pretrain_tokens else phase
        self._num_epochs = 1.0 if pretrain_tokens else settings.epochs
        per_step = settings.accumulate * accelerator.num_processes
        reads_sources = is_encoder_decoder(student)
        if pretrain_tokens:
            steps = math.ceil(pretrain_tokens / (settings.batch_tokens * per_step))
            self.plan = plan_text(lesson.texts, steps, settings, per_step, reads_sources)
        else:
            self.plan = plan_steps(lesson.answers, lesson.texts, settings, per_step, reads_sources)
        self.optimizer = _optimizer(student, settings)
        made_for = signature(
            student, [*lesson.answers, *lesson.texts], settings, accelerator.num_processes
        )
        self._file = Checkpoint(checkpoint, f"{self.phase} {made_for}")
        self.training = self._file.load(student, self.optimizer)
        self._objective, self._optimizer = accelerator.prepare(
            Objective(student, settings), self.optimizer
        )

    def run(
        self,
        validate: Callable[[PreTrainedModel], tuple[float, dict[str, Any]]],
        on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
        on_validated: Callable[[dict[str, Any]], None] = lambda entry: None,
    ) -> Training:
        """Train up to the weights of the best validation; return the run's state.

        validate: returns a score, of which more is better, and the figures of the history's entry.
        Raises DivergedError if a loss or gradient is not finite, ConfigError if a checkpoint cannot be
        written; the last one stays. Ctrl-C saves a checkpoint after the step and raises
        KeyboardInterrupt.
        """
        settings, training, total = self.settings, self.training, len(self.plan)
        every = max(1, round(settings.validate_every * total / self._num_epochs))
        clock = _Clock(training)
        with deferred_interrupt() as interrupted:
            while training.step < total:
                self._step(self.plan[training.step])
                ends = training.step == total
                if training.step % every == 0 or ends:
                    self._validate(validate, clock.tokens_per_second())
                    if training.history:  # of the first process only
                        on_validated(training.history[-1])
                stops = self._in_any_process(interrupted())
                if training.step % settings.checkpoint_every == 0 or ends or stops:
                    clock.stop()
                    self._save()
                if stops:
                    raise KeyboardInterrupt
                on_progress(self._progress(clock.tokens_per_second()))
            if self._in_any_process(interrupted()):  # during the last report
                raise KeyboardInterrupt
        if training.best_weights:
            self.student.load_state_dict(training.best_weights)
        self.student.eval()
        return training

    def _step(self, step: PlannedStep) -> None:
        """Update the weights once."""
        accelerator, settings, training = self.accelerator, self.settings, self.training
        rate = learning_rate(training.step, len(self.plan), settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._objective.eval()  # dropout would make a resumed run differ
        mine = step.batches[accelerator.process_index :: accelerator.num_processes]
        # all processes synchronise: one without a batch computes another's, which counts nothing
        share = 1.0 if mine else 0.0
        mine = mine or step.batches[:1]
        total = torch.zeros((), device=accelerator.device)
        for i, members in enumerate(mine):
            ends = i == len(mine) - 1
            with nullcontext() if ends else accelerator.no_sync(self._objective):
                part = self._loss(step, members) * share
                # processes are averaged, so each sums to the number of processes
                accelerator.backward(part * accelerator.num_processes)
            total += part.detach()
        loss = float(accelerator.reduce(total, "sum"))
        self._check_finite("loss", loss)
        norm = accelerator.clip_grad_norm_(self.student.parameters(), settings.max_gradient_norm)
        # or the next checkpoint would hold weights that are not numbers
        self._check_finite("gradient", float(norm))
        self._optimizer.step()
        self._optimizer.zero_grad()
        training.loss = (
            loss if not training.step else (_SMOOTHING * training.loss + (1 - _SMOOTHING) * loss)
        )
        training.step += 1
        source = self._source(step)
        training.tokens += sum(len(source[i].tokens) - 1 for batch in step.batches for i in batch)
        self._average()

    def _loss(self, step: PlannedStep, members: list[int]) -> torch.Tensor:
        """Return the part of a batch in the step's weighted mean loss."""
        lesson, settings = self.lesson, self.settings
        source = self._source(step)
        examples = [source[i] for i in members]
        prompt_weight = settings.prompt_weight if step.of_answers else 0.0
        batch = collate(examples, prompt_weight).to(self.accelerator.device)
        teacher: Teacher = TextTeacher(batch.targets)
        learns_text = not step.of_answers or settings.loss == "cross_entropy"
        if not learns_text and lesson.distributions is not None:
            teacher = lesson.distributions.teacher(batch, examples)
        totals: Totals = self._objective(batch, teacher, step.of_answers)
        return totals.loss / step.weight

    def _source(self, step: PlannedStep) -> Sequence[Example]:
        return self.lesson.answers if step.of_answers else self.lesson.texts

    def _check_finite(self, what: str, value: float) -> None:
        """Raise DivergedError if a step's value is not finite."""
        if math.isfinite(value):
            return
        kept = self._file.path
        state = f"the last checkpoint is kept in {kept}" if kept.exists() else "no checkpoint yet"
        raise DivergedError(
            f"the {what} of step {self.training.step + 1} is {value}; {state}: choose a "
            f"learning_rate below {self.settings.learning_rate:g} and run the command again"
        )

    def _in_any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum"))

    # --- moving average, validation, checkpoint -------------------------------------------------

    def _average(self) -> None:
        decay, training = self.settings.ema_decay, self.training
        if not decay:
            return
        weights = self.student.state_dict()
        if not training.average:
            training.average = {name: weight.clone() for name, weight in weights.items()}
            return
        # the first averages follow the weights quickly
        decay = min(decay, (1 + training.step) / (10 + training.step))
        for name, weight in weights.items():
            training.average[name].lerp_(weight.to(training.average[name].device), 1 - decay)

    def _validate(
        self,
        validate: Callable[[PreTrainedModel], tuple[float, dict[str, Any]]],
        tokens_per_second: float,
    ) -> None:
        training, student = self.training, self.student
        if self.accelerator.is_main_process:
            own = {name: weight.clone() for name, weight in student.state_dict().items()}
            averaged = training.average or own
            student.load_state_dict(averaged)
            student.eval()
            score, figures = validate(student)
            student.load_state_dict(own)
            facts = {"phase": self.phase, "step": training.step, "tokens": training.tokens}
            facts |= {"train_loss": round(training.loss, 4), "score": round(score, 5)}
            facts |= {"tokens_per_second": round(tokens_per_second)}
            training.history.append(facts | figures)
            if score > training.best_score:
                training.best_score, training.best_step = score, training.step
                training.best_weights = {n: w.detach().cpu().clone() for n, w in averaged.items()}
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            self._file.save(self.student, self.optimizer, self.training)

    def _progress(self, tokens_per_second: float) -> TrainingProgress:
        training = self.training
        figures = training.history[-1] if training.history else None
        return TrainingProgress(
            self.phase, training.step, len(self.plan), training.loss, tokens_per_second, figures
        )


class _Clock:
    """Adds the seconds of a run to its state."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._began, self._tokens = self._wall, training.tokens

    def stop(self) -> None:
        """Add the seconds since the last call."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._training.seconds += wall - self._wall
        self._training.cpu_seconds += cpu - self._cpu
        self._wall, self._cpu = wall, cpu

    def tokens_per_second(self) -> float:
        """Return the mean since the start of this process."""
        seconds = max(1e-9, time.perf_counter() - self._began)
        return (self._training.tokens - self._tokens) / seconds


def _optimizer(student: PreTrainedModel, settings: DistillSettings) -> torch.optim.AdamW:
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
