"""DISTIL: train drafters on text that the target itself wrote, and small models on pairs."""

from paceline.distillation.facts import DistillReport
from paceline.distillation.pretrain_settings import PretrainSettings
from paceline.distillation.pretraining import PretrainReport, pretrain
from paceline.distillation.run import distill
from paceline.distillation.settings import DistillationSection, DistillSettings
from paceline.distillation.train import TrainingProgress

__all__ = [
    "DistillReport",
    "DistillSettings",
    "DistillationSection",
    "PretrainReport",
    "PretrainSettings",
    "TrainingProgress",
    "distill",
    "pretrain",
]
