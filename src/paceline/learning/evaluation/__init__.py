"""What policies would gain, by replay."""

from paceline.learning.evaluation.report import POLICY, EvaluationReport, Outcomes, evaluate

__all__ = ["POLICY", "EvaluationReport", "Outcomes", "evaluate"]
