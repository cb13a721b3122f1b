"""One run: a student is trained, saved, and measured on the judged answers as it was saved.

A killed run continues from its checkpoint. Needs the materials, the students' folder and no target.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch

from paceline.bench.circumstances import cpu_model
from paceline.distillation.measures import measure
from paceline.distillation.model_folders import load_float32
from paceline.distillation.replays import matches_of, replay_validation
from paceline.distillation.train import DivergedError, Lesson, Trainer, start_accelerator
from paceline.errors import ConfigError
from paceline.experiments.direct_alignment.plan import LENGTHS
from paceline.experiments.direct_alignment.results import pack
from paceline.models.loading import DTYPES, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from paceline.distillation.batches import Example
    from paceline.distillation.checkpoints import Training
    from paceline.distillation.measures import Measures, TaskMeasures
    from paceline.distillation.replays import TextReplay
    from paceline.distillation.settings import DistillSettings
    from paceline.experiments.direct_alignment.materials import Materials
    from paceline.experiments.direct_alignment.plan import Run

_DIGITS: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class RunContext:
    """The texts, folder and settings that all runs need.

    round_costs: [K + 1] of a student, in units of a plain round.
    """

    materials: Materials
    folder: Path
    round_costs: np.ndarray
    validations: int  # per run
    on_cpu: bool
    commit: str

    def student(self, name: str) -> Path:
        """Return the folder of a student: see `name_of` and `new_student`."""
        return self.folder / "students" / name

    def checkpoint(self, run: Run) -> Path:
        """Return the file of an unfinished run."""
        return self.folder / "checkpoints" / f"{run.id}.pt"


def new_student(seed: int) -> str:
    """Return the name of the untrained student of a seed."""
    return f"new-{seed}"


def train(run: Run, context: RunContext) -> dict[str, Any]:
    """Make a run and return its facts for the results, `diverged` alone if its loss was not finite.

    Raises ConfigError as `Trainer` does.
    """
    materials = context.materials
    pretrains = run.phase == "pretrain"
    answers = [] if pretrains else materials.training(run)
    settings = _settings(run, answers, context)
    start = _start(run, context)
    lesson = Lesson(answers, materials.plain if pretrains else (), materials.distributions)
    trainer = Trainer(
        load_float32(start),
        lesson,
        settings,
        context.checkpoint(run),
        start_accelerator(context.on_cpu),
        run.tokens if pretrains else 0,
    )

    def validate(student: PreTrainedModel) -> tuple[float, dict[str, Any]]:
        replays = replay_validation(student, materials.validation, materials.distributions)
        return _measure(replays, context).mean.predicted_speedup, {}

    try:
        training = trainer.run(validate)
    except DivergedError:
        return {"run": run.model_dump(mode="json"), "diverged": True}
    made = context.student(name_of(run))
    save_student(trainer.student, made, "bfloat16")
    return {
        "run": run.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json", exclude={"outputs", "threads", "license"}),
        "num_answers": len(answers),
        **_judge(load_float32(made), context),
        **_facts(training, context),
    }


def name_of(run: Run) -> str:
    """Return the name of a run's student."""
    return f"pretrained-{run.seed}" if run.phase == "pretrain" else run.id


def save_student(
    student: PreTrainedModel, folder: Path, dtype: Literal["bfloat16", "float32"]
) -> None:
    """Write a student, replacing what a killed program left."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet_transformers():
        student.to(DTYPES[dtype]).save_pretrained(part)  # type: ignore[arg-type]
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def _start(run: Run, context: RunContext) -> Path:
    """Return the student that a run begins with. Raises ConfigError if it was deleted."""
    if run.phase == "pretrain":
        return context.student(new_student(run.seed))
    folder = context.student(f"pretrained-{run.seed}")
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: the pre-trained student is missing; remove the line of its run (phase "
            "'pretrain') from the results, and it is made again"
        )
    return folder


def _settings(run: Run, answers: Sequence[Example], context: RunContext) -> DistillSettings:
    """Return a run's settings: as many passes over its answers as its number of tokens takes."""
    per_epoch = sum(len(example.tokens) - 1 for example in answers)
    epochs = run.tokens / per_epoch if per_epoch else 1.0
    changes = {
        "loss": run.loss,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "epochs": epochs,
        "validate_every": epochs / context.validations,
    }
    return context.materials.settings.model_copy(update=changes)


def _measure(replays: Sequence[TextReplay], context: RunContext) -> Measures:
    return measure(matches_of(replays), context.materials.parameter_ratio, context.round_costs)


def _judge(student: PreTrainedModel, context: RunContext) -> dict[str, Any]:
    """Return the measures on the judged answers, greedy and sampled."""
    materials = context.materials
    greedy = replay_validation(student, materials.judging, materials.distributions)
    sampled = replay_validation(student, materials.judging_sampled, materials.distributions)
    measures, on_sampled = _measure(greedy, context), _measure(sampled, context)
    return {
        "mean": _plain(measures.mean),
        "tasks": {task: _plain(own) for task, own in measures.tasks.items()},
        "sampled": _plain(on_sampled.mean),
        "match": pack([r.matches.numpy() for r in greedy]),
        "accepted": [round(float(r.accepted.double().mean()), _DIGITS) for r in greedy],
    }


def _plain(own: TaskMeasures) -> dict[str, Any]:
    return {
        "match_rate": round(own.match_rate, _DIGITS),
        "acceptance": round(own.acceptance, _DIGITS),
        "block_efficiency": {str(k): round(float(own.block_efficiency[k]), 4) for k in LENGTHS},
        "mbsu": {str(k): round(float(own.mbsu[k]), 4) for k in LENGTHS},
        "best_length": own.best_length,
        "predicted_speedup": round(own.predicted_speedup, 4),
    }


def _facts(training: Training, context: RunContext) -> dict[str, Any]:
    return {
        "validation": round(training.best_score, _DIGITS),
        "best_step": training.best_step,
        "steps": training.step,
        "tokens": training.tokens,
        "seconds": round(training.seconds, 1),
        "cpu_seconds": round(training.cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "processor": cpu_model(),
        "commit": context.commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
