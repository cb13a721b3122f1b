"""JUDGE: the accepted part of each draft and the token after it. It knows no model and no engine."""

from paceline.verification.acceptance import AcceptedPrefixes, accept_block, accept_residual
from paceline.verification.judge import Verdict, depths, follow, judge

__all__ = [
    "AcceptedPrefixes",
    "Verdict",
    "accept_block",
    "accept_residual",
    "depths",
    "follow",
    "judge",
]
