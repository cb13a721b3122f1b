"""The length of a draft: all rules, in the order in which they apply, and the stop rules.

1. The arm. The policy, and between rounds the controller, choose a drafter and with it a length:
   `math@3` drafts up to 3 tokens, `math` up to its `num_draft_tokens`, `none` nothing
   (`contracts.split_arm`; selection/adaptation.py prices the lengths of every arm).
2. The engine's limit: the tokens that the request may still emit minus the target's own, and at
   most the arm's length (`Row.limit_at`). Replay applies the same limit (`replay.simulate`).
3. The drafter's own limits: `num_draft_tokens`, and
   - draft_model, cross_vocabulary: the free positions of its cache (`DraftModel.propose`),
   - suffix_lookup: a factor times the length of the match (`SuffixLookup._max_length`),
   - trigram_tree: `depth` levels; union: the nodes most likely to be accepted (`merge`),
   - cascade: the length with the most expected tokens per second (`cascade.kernels`).
4. The stop rule, asked between two tokens (this module): `FixedLength`, `ConfidenceStop` and
   `ExpectedGainStop` for draft models, `AdaptiveThreshold` for layer_skip. Lookups and searches end
   where they find no token, or none that is likely enough.
5. The contract: a draft longer than the limit or `num_draft_tokens` is an error
   (`contract.read_drafts`).

A stop rule reads the distributions of drafted tokens, never the tokens, so it does not bias the text.
The first token is always drafted: the arm decides whether to draft at all.
Symbols: c_i = the drafter's largest probability at place i, before any warping; P_k = c_1 ... c_k, the
probability that all of k tokens are accepted, if c_i is the probability for token i.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section
from paceline.costs.pricing import round_seconds
from paceline.errors import ArtefactError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.costs.table import CostTable

# contexts are rounded down to a multiple, so that prices are read rarely
_CONTEXT_STEP: Final = 128


class StopRule(Protocol):
    """A rule that decides whether a draft gets one more token."""

    def allows_next(self, confidences: Sequence[float], context: int) -> bool:
        """Return whether to draft a further token. confidences: c_1 ... c_k, k >= 1; context: tokens."""


def confidences(logits: Tensor) -> Tensor:
    """Return c [...] of logits [..., V]. The result for a place does not depend on the others."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


# --- draft models ---------------------------------------------------------------------------------


class StopSettings(Section):
    """The stop rule of a chain drafter.

    fixed: at num_draft_tokens. confidence: also where P_k falls below `threshold`. expected: also
    where no longer draft promises more tokens per second by this machine's cost table.
    """

    num_draft_tokens: int = Field(default=4, ge=1, le=MAX_DRAFT_TOKENS)
    stop: Literal["fixed", "confidence", "expected"] = "fixed"
    threshold: float = Field(default=0.4, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _threshold_is_used(self) -> StopSettings:
        if "threshold" in self.model_fields_set and self.stop != "confidence":
            raise ValueError(f"'threshold' belongs to 'stop: confidence', stop is '{self.stop}'")
        return self

    def stop_identity(self) -> dict[str, object]:
        """Return the rule's part of a drafter's identity; empty at fixed length."""
        if self.stop == "confidence":
            return {"stop": self.stop, "threshold": self.threshold}
        return {} if self.stop == "fixed" else {"stop": self.stop}


class FixedLength:
    """The rule to draft up to the limit."""

    def allows_next(self, confidences: Sequence[float], context: int) -> bool:
        return True


class ConfidenceStop:
    """The rule to draft while P_k is at least the threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def allows_next(self, confidences: Sequence[float], context: int) -> bool:
        return prod(confidences) >= self.threshold


class ExpectedGainStop:
    """The rule to draft while some longer draft promises more tokens per second than this one.

    A round with k drafted tokens is expected to emit E_k = 1 + P_1 + ... + P_k tokens in T_k seconds,
    those of `costs.pricing.round_seconds` for a request alone in flight. Each further token gets the
    geometric mean of the confidences so far. All longer drafts are compared, because T rises in steps.
    """

    def __init__(self, costs: CostTable | None, arm: str, num_draft_tokens: int) -> None:
        """costs: None until the machine's prices are known; then the rule raises ArtefactError."""
        self._costs, self._arm = costs, arm
        self._lengths = np.arange(num_draft_tokens + 1)
        self._seconds_at: dict[int, list[float]] = {}

    def allows_next(self, confidences: Sequence[float], context: int) -> bool:
        seconds = self._seconds(context // _CONTEXT_STEP * _CONTEXT_STEP)
        k = len(confidences)
        all_accepted = emitted = 1.0
        for c in confidences:
            all_accepted *= c
            emitted += all_accepted
        mean = all_accepted ** (1 / k)
        expected = emitted
        for longer in seconds[k + 1 :]:
            all_accepted *= mean
            expected += all_accepted
            if expected * seconds[k] >= emitted * longer:
                return True
        return False

    def _seconds(self, context: int) -> list[float]:
        """Return T_0 ... T_K."""
        seconds = self._seconds_at.get(context)
        if seconds is None:
            if self._costs is None:
                raise ArtefactError(
                    f"'{self._arm}' stops by expected gain, which needs this machine's costs; run "
                    "`paceline profile`, or set another 'stop'"
                )
            seconds = round_seconds(
                self._costs.seconds, self._arm, self._lengths, np.array(context)
            ).tolist()
            self._seconds_at[context] = seconds
        return seconds


FIXED_LENGTH: Final = FixedLength()


def make_rule(arm: str, settings: StopSettings) -> StopRule:
    """Return the rule of an arm's settings, without prices."""
    if settings.stop == "confidence":
        return ConfidenceStop(settings.threshold)
    if settings.stop == "fixed":
        return FIXED_LENGTH
    return ExpectedGainStop(None, arm, settings.num_draft_tokens)


# --- layer_skip -----------------------------------------------------------------------------------


class ThresholdSettings(Section):
    """The adaptive exit. Published: threshold 0.6, eps 0.01, beta1 0.5, beta2 0.9, alpha 0.7 to 0.9."""

    threshold: float = Field(default=0.6, ge=0.0, le=1.0)
    target_acceptance: float = Field(default=0.85, ge=0.0, le=1.0)  # alpha
    threshold_step: float = Field(default=0.01, ge=0.0, le=1.0)  # eps
    acceptance_memory: float = Field(default=0.5, ge=0.0, lt=1.0)  # beta1
    threshold_memory: float = Field(default=0.9, ge=0.0, le=1.0)  # beta2


@dataclass(slots=True)
class AdaptiveThreshold:
    """One row's threshold for c: the adaptive exit of Draft & Verify.

    arXiv 2309.08168, section 3.2 and appendix B. A draft ends with the first token whose c is below the
    threshold; the token itself stays in the draft. After each round, with Acc the mean accepted share,

        Acc <- beta1 Acc + (1 - beta1) accepted / drafted
        threshold <- beta2 threshold + (1 - beta2) (threshold +- eps),   + if Acc <= alpha

    so drafts get shorter if less is accepted than `target_acceptance`. The first round's share starts
    Acc. As in the authors' code, the threshold is not lowered after a draft that reached the limit.
    """

    settings: ThresholdSettings
    threshold: float
    acceptance: float | None = None

    @classmethod
    def of(cls, settings: ThresholdSettings) -> AdaptiveThreshold:
        return cls(settings, settings.threshold)

    def ends(self, confidence: float) -> bool:
        """Return whether a token drafted with this c is the draft's last."""
        return confidence < self.threshold

    def update(self, drafted: int, accepted: int, reached_limit: bool) -> None:
        """Adapt the threshold to a round. reached_limit: the draft was as long as rules 1 to 3 allow."""
        if not drafted:
            return
        s, share = self.settings, accepted / drafted
        if self.acceptance is not None:
            share = s.acceptance_memory * self.acceptance + (1 - s.acceptance_memory) * share
        self.acceptance = share
        if share > s.target_acceptance and reached_limit:
            return
        step = s.threshold_step if share <= s.target_acceptance else -s.threshold_step
        moved = min(max(self.threshold + step, 0.0), 1.0)
        self.threshold = s.threshold_memory * self.threshold + (1 - s.threshold_memory) * moved
