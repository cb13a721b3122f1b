"""DISTIL: train drafters on text that the target itself wrote."""

from paceline.distillation.facts import DistillReport
from paceline.distillation.run import distill
from paceline.distillation.settings import DistillationSection, DistillSettings
from paceline.distillation.train import TrainingProgress

__all__ = ["DistillReport", "DistillSettings", "DistillationSection", "TrainingProgress", "distill"]
