"""VERIFY: which part of a draft is kept, and what stands behind it. Knows no model and no engine."""

from paceline.verification.judge import judge_block, judge_residual
from paceline.verification.trees import depths, follow

__all__ = ["depths", "follow", "judge_block", "judge_residual"]
