"""JUDGE: which draft tokens the target keeps. Tensors in, verdicts out; no models, no tokenizers."""

from paceline.verification.judge import judge_matches, judge_residual

__all__ = ["judge_matches", "judge_residual"]
