"""The cost of the target's distributions: stored ones against the target in every step of a training."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from paceline.distillation.distributions import (
    LiveDistributions,
    open_distributions,
    store_distributions,
)
from paceline.distillation.model_folders import load_float32
from paceline.distillation.train import Lesson, Trainer, start_accelerator
from paceline.experiments.direct_alignment.training import new_student
from paceline.learning.learners.networks import one_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.distillation.batches import Example
    from paceline.distillation.train import Distributions
    from paceline.experiments.direct_alignment.training import RunContext
    from paceline.models.language_model import LanguageModel

_REPEATS: Final = 2
_LOSS: Final = "kl"


def time_teachers(target: LanguageModel, context: RunContext, num_tokens: int) -> dict[str, Any]:
    """Return tokens per second of the same training with each teacher, one thread, in turns.

    `storing`: tokens per second of the pass that computes and stores the distributions.
    """
    texts = _texts(context, num_tokens)
    learned = sum(len(example.tokens) - 1 for example in texts)
    teachers: dict[str, Distributions] = {
        "cached": context.materials.distributions,
        "live": LiveDistributions.of(target, 1.0),
    }
    seconds = dict.fromkeys(teachers, 0.0)
    cpu_seconds = dict.fromkeys(teachers, 0.0)
    with one_thread(), TemporaryDirectory() as folder:
        for repeat in range(_REPEATS):
            for name, teacher in teachers.items():
                file = Path(folder) / f"{name}-{repeat}.pt"
                wall, cpu = _train(context, texts, teacher, file)
                seconds[name] += wall / _REPEATS
                cpu_seconds[name] += cpu / _REPEATS
        began = time.perf_counter()
        store = open_distributions(Path(folder), target, context.materials.settings)
        store_distributions(target, texts, store)
        storing = time.perf_counter() - began
        size = sum(file.stat().st_size for file in store.folder.rglob("*.parquet"))
    top_k = context.materials.settings.teacher_top_k
    return {
        "loss": _LOSS,
        "tokens": learned,
        "top_k": top_k,
        "tokens_per_second": {n: round(learned / s, 1) for n, s in seconds.items()},
        "tokens_per_cpu_second": {n: round(learned / s, 1) for n, s in cpu_seconds.items()},
        "storing": round(learned / storing, 1),
        "bytes_per_token": round(size / learned, 1),
    }


def _texts(context: RunContext, num_tokens: int) -> list[Example]:
    """Return answers of all tasks in turns, up to a number of tokens."""
    texts: list[Example] = []
    total = 0
    for members in zip(*context.materials.greedy.values(), strict=False):
        if total >= num_tokens:
            break
        texts += members
        total += sum(len(example.tokens) - 1 for example in members)
    return texts


def _train(
    context: RunContext, texts: Sequence[Example], teacher: Distributions, file: Path
) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of one pass."""
    changes = {"loss": _LOSS, "epochs": 1.0, "checkpoint_every": 10**9, "validate_every": 1.0}
    trainer = Trainer(
        load_float32(context.student(new_student(0))),
        Lesson(texts, (), teacher),
        context.materials.settings.model_copy(update=changes),
        file,
        start_accelerator(context.on_cpu),
    )
    training = trainer.run(lambda student: (0.0, {}))
    return training.seconds, training.cpu_seconds
