"""VERIFY: which part of a draft is kept, and what stands behind it. Knows no model and no engine."""

from paceline.verification.judge import accept_block, accept_residual
from paceline.verification.trees import depths, follow

__all__ = ["accept_block", "accept_residual", "depths", "follow"]
