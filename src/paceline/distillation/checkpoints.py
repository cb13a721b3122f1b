"""The state of a training, written in one step so that a killed run continues to the same weights."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.errors import ConfigError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.distillation.batches import Example
    from paceline.distillation.settings import DistillSettings

# settings that a run may be continued with after a change
_FREE: Final = frozenset(
    {
        "answers_drafter",
        "checkpoint_every",
        "dtype",
        "events",
        "learning_rate",
        "license",
        "max_prompts",
        "outputs",
        "threads",
    }
)


@dataclass(slots=True)
class Training:
    """The state of a run; all of it is in the checkpoint."""

    step: int = 0
    loss: float = math.nan  # smoothed over about twenty steps
    seconds: float = 0.0  # wall-clock
    cpu_seconds: float = 0.0  # of all threads, independent of other work on the machine
    tokens: int = 0  # read by the student
    best_step: int = -1
    best_score: float = -math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)  # of the weights, if one is kept
    history: list[dict[str, Any]] = field(default_factory=list)
    # at which the best weights are chosen, see `Prices.round_costs`; None without prices
    round_costs: list[float] | None = None


class Checkpoint:
    """The file of one run's state."""

    def __init__(self, path: Path, made_for: str) -> None:
        """made_for: the `signature` of the run."""
        self.path = path
        self._made_for = made_for

    def save(
        self, student: PreTrainedModel, optimizer: torch.optim.Optimizer, training: Training
    ) -> None:
        """Replace the file. Raises ConfigError if it cannot be written; the old one stays."""
        buffer = io.BytesIO()
        torch.save(
            {
                "made_for": self._made_for,
                "student": student.state_dict(),
                "optimizer": optimizer.state_dict(),
                "training": {name: getattr(training, name) for name in Training.__slots__},
            },
            buffer,
        )
        try:
            write_atomically(self.path, buffer.getvalue())
        except OSError as error:
            raise ConfigError(
                f"{self.path}: the checkpoint of step {training.step} cannot be written "
                f"({error.strerror}); the one before it is kept: make room and run the same command"
            ) from error

    def load(self, student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Training:
        """Return the state of a killed run after loading its weights, or a new state.

        Raises ConfigError if the file cannot be read or belongs to another run.
        """
        if not self.path.exists():
            return Training()
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            made_for = saved["made_for"]
        except Exception as error:
            raise ConfigError(
                f"{self.path}: cannot be read; delete it to train from the start"
            ) from error
        if made_for != self._made_for:
            raise ConfigError(
                f"{self.path}: this unfinished run has other settings or other texts; use those, or "
                "delete the file to train from the start"
            )
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        return Training(**saved["training"])


def signature(
    student: PreTrainedModel,
    texts: Sequence[Example],
    settings: DistillSettings,
    num_processes: int,
) -> str:
    """Return a hash of the settings, texts and student's shapes that a checkpoint depends on."""
    relevant = settings.model_dump_json(exclude=set(_FREE))
    digest = hashlib.sha256(f"{relevant} {num_processes}".encode())
    for example in texts:
        digest.update(f"{example.id} {example.num_prompt}".encode() + example.tokens.tobytes())
    for name, weight in student.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
    return digest.hexdigest()[:16]
