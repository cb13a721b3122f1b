"""DISTIL: train drafters on text that the target itself wrote."""

from paceline.distillation.run import DistillReport, distill
from paceline.distillation.settings import DistillSettings
from paceline.distillation.train import TrainingProgress

__all__ = ["DistillReport", "DistillSettings", "TrainingProgress", "distill"]
