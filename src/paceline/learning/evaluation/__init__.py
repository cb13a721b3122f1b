"""Predicted gains of policies, next to those of the strategies that they must beat."""

from paceline.learning.evaluation.contenders import Contender, parse_encoders, train_contenders
from paceline.learning.evaluation.exposure import Exposure, in_other_words, unseen_part
from paceline.learning.evaluation.report import EvaluationReport
from paceline.learning.evaluation.sections import Evaluation, Evaluator, evaluate_chooser
from paceline.learning.evaluation.strategies import POLICY

__all__ = [
    "POLICY",
    "Contender",
    "Evaluation",
    "EvaluationReport",
    "Evaluator",
    "Exposure",
    "evaluate_chooser",
    "in_other_words",
    "parse_encoders",
    "train_contenders",
    "unseen_part",
]
