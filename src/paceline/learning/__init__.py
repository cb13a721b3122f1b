"""LEARN: train and evaluate policies from a collection. No transformer runs here."""

from paceline.learning.evaluation import EvaluationReport, evaluate
from paceline.learning.learn import LearningResult, learn

__all__ = ["EvaluationReport", "LearningResult", "evaluate", "learn"]
