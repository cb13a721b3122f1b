"""LEARN: train and evaluate policies from a collection. No transformer runs here."""

from paceline.learning.evaluate import EvaluationReport, evaluate
from paceline.learning.from_choices import ChoicesResult, learn_from_choices
from paceline.learning.learn import LearningResult, learn

__all__ = [
    "ChoicesResult",
    "EvaluationReport",
    "LearningResult",
    "evaluate",
    "learn",
    "learn_from_choices",
]
