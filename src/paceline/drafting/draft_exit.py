"""When a row stops drafting: at a fixed length, or once the drafter is no longer sure.

Draft & Verify's adaptive exit (arXiv 2309.08168, section 3.2 and appendix B). A draft ends behind
the first token with max q below a threshold; the token itself is kept, so the rule never takes back
what was drawn. After each round, with Acc the accepted share of what was drafted,

    Acc <- beta1 Acc + (1 - beta1) accepted / drafted
    threshold <- beta2 threshold + (1 - beta2) (threshold +- eps),   + if Acc <= alpha

so drafts get shorter where less is accepted than `target_acceptance` (alpha). As in the authors'
code the threshold stays where it would be lowered after a draft that was as long as allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class ThresholdSettings(BaseModel):
    """Published constants: threshold 0.6, eps 0.01, beta1 0.5, beta2 0.9, alpha 0.7 to 0.9."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(default=0.6, ge=0.0, le=1.0)
    target_acceptance: float = Field(default=0.85, ge=0.0, le=1.0)
    threshold_step: float = Field(default=0.01, ge=0.0, le=1.0)  # eps
    acceptance_memory: float = Field(default=0.5, ge=0.0, lt=1.0)  # beta1
    threshold_memory: float = Field(default=0.9, ge=0.0, le=1.0)  # beta2


@dataclass(slots=True)
class DraftExit:
    """One row's threshold. The first round's accepted share starts Acc."""

    settings: ThresholdSettings
    threshold: float
    acceptance: float | None = None

    @classmethod
    def of(cls, settings: ThresholdSettings) -> DraftExit:
        return cls(settings, settings.threshold)

    def ends(self, confidence: float) -> bool:
        """Whether a token drawn with this max q is the draft's last."""
        return confidence < self.threshold

    def update(self, drafted: int, accepted: int, full: bool) -> None:
        """Learn from a round. full: whether the draft was as long as the round allowed."""
        if not drafted:
            return
        s, share = self.settings, accepted / drafted
        if self.acceptance is not None:
            share = s.acceptance_memory * self.acceptance + (1 - s.acceptance_memory) * share
        self.acceptance = share
        if share > s.target_acceptance and full:
            return
        step = s.threshold_step if share <= s.target_acceptance else -s.threshold_step
        moved = min(max(self.threshold + step, 0.0), 1.0)
        self.threshold = s.threshold_memory * self.threshold + (1 - s.threshold_memory) * moved
