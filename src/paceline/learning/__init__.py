"""LEARN: train and evaluate policies from a collection or a decision log. No model runs here."""

from paceline.learning.evaluation import Evaluation
from paceline.learning.from_choices import ChoicesResult, learn_from_choices
from paceline.learning.from_texts import TextsResult
from paceline.learning.learn import LearningResult, train_policy

__all__ = [
    "ChoicesResult",
    "Evaluation",
    "LearningResult",
    "TextsResult",
    "learn_from_choices",
    "train_policy",
]
