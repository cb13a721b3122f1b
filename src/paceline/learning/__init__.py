"""LEARN: train and evaluate policies from a collection. No transformer runs here."""

from paceline.learning.evaluation import Evaluation, EvaluationReport, evaluate_chooser
from paceline.learning.learn import LearningResult, learn

__all__ = ["Evaluation", "EvaluationReport", "LearningResult", "evaluate_chooser", "learn"]
