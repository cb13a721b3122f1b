"""What policies would gain, by replay, beside the ways of choosing they must beat."""

from paceline.learning.evaluation.contenders import Contender, parse_encoders, train_contenders
from paceline.learning.evaluation.report import POLICY, EvaluationReport, Outcomes, evaluate
from paceline.learning.evaluation.sections import Evaluation, Evaluator, Section, evaluate_chooser

__all__ = [
    "POLICY",
    "Contender",
    "Evaluation",
    "EvaluationReport",
    "Evaluator",
    "Outcomes",
    "Section",
    "evaluate",
    "evaluate_chooser",
    "parse_encoders",
    "train_contenders",
]
