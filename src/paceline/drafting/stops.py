"""When a chain drafter stops before its full length. Pure: confidences and prices in, yes or no out.

A rule is asked between two tokens, before the next one's forward, so it never drops a token that
was drawn; what it looks at are distributions the drafted tokens came from, never which tokens these
were. The first token is always drafted: whether to draft at all is the policy's choice.
Symbols: c_i = the drafter's largest probability at place i, before any warping; P_k = c_1 ... c_k, the
odds that k tokens are all accepted, where c is taken for the chance of each.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section
from paceline.costs.table import ENGINE, FORWARD, PROPOSE, ROUND, TARGET
from paceline.errors import ArtefactError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.costs.table import CostTable

_CONTEXT_STEP: Final = 128  # prices are looked up once for so many positions


class StopSettings(Section):
    """How a chain drafter's draft ends.

    fixed: at num_draft_tokens. confidence: also where the odds that all of it is accepted fall below
    `threshold`. expected: also where one token more is expected to slow the round down on this
    machine, by its cost table.
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
        """What a rule adds to a drafter's identity; nothing where length alone decides."""
        if self.stop == "confidence":
            return {"stop": self.stop, "threshold": self.threshold}
        return {} if self.stop == "fixed" else {"stop": self.stop}


class StopRule(Protocol):
    """Whether to draft one more token."""

    def goes_on(self, confidences: Sequence[float], context: int) -> bool:
        """confidences: c_1 ... c_k of the k >= 1 tokens drafted; context: tokens cached before them."""


class FixedLength:
    """Goes on to the drafter's own length."""

    def goes_on(self, confidences: Sequence[float], context: int) -> bool:
        return True


class ConfidenceStop:
    """Goes on while P_k is at least the threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def goes_on(self, confidences: Sequence[float], context: int) -> bool:
        return prod(confidences) >= self.threshold


class ExpectedGainStop:
    """Goes on while some longer draft promises more tokens per second than ending here.

    With k tokens drafted a round is expected to emit E_k = 1 + P_1 + ... + P_k tokens in T_k seconds: k
    draft steps, the verification of 1 + k tokens and the host's part. Further tokens are taken to be
    as sure as those before were on average. All longer drafts are looked at, because T rises in
    steps. Prices are those of a request on its own.
    """

    def __init__(self, costs: CostTable, arm: str, num_draft_tokens: int) -> None:
        self._costs, self._arm = costs, arm
        self._lengths = np.arange(num_draft_tokens + 1)
        self._round_seconds: dict[int, list[float]] = {}

    def goes_on(self, confidences: Sequence[float], context: int) -> bool:
        seconds = self._seconds(context // _CONTEXT_STEP * _CONTEXT_STEP)
        k = len(confidences)
        alive = emitted = 1.0
        for c in confidences:
            alive *= c
            emitted += alive
        mean = alive ** (1 / k)
        expected = emitted
        for longer in seconds[k + 1 :]:
            alive *= mean
            expected += alive
            if expected * seconds[k] >= emitted * longer:
                return True
        return False

    def _seconds(self, context: int) -> list[float]:
        """T_0 ... T_K."""
        found = self._round_seconds.get(context)
        if found is None:
            costs, lengths = self._costs, self._lengths
            total = costs.seconds(self._arm, PROPOSE, lengths, context)
            total = total + costs.seconds(TARGET, FORWARD, 1 + lengths, context)
            found = (total + costs.seconds(ENGINE, ROUND, 0)).tolist()
            self._round_seconds[context] = found
        return found


class Unpriced:
    """Stands where an expected-gain rule waits for its prices."""

    def __init__(self, arm: str) -> None:
        self._arm = arm

    def goes_on(self, confidences: Sequence[float], context: int) -> bool:
        raise ArtefactError(
            f"'{self._arm}' stops by expected gain, which needs this machine's costs; run "
            "`paceline profile`, or set another 'stop'"
        )


FIXED_LENGTH: Final = FixedLength()


def stop_rule(arm: str, settings: StopSettings) -> StopRule:
    """The rule of an arm's settings; an expected-gain rule has yet to be priced."""
    if settings.stop == "confidence":
        return ConfidenceStop(settings.threshold)
    return FIXED_LENGTH if settings.stop == "fixed" else Unpriced(arm)


def confidences(logits: Tensor) -> Tensor:
    """c [...] of logits [..., V], the same for one place as for many."""
    return logits.float().softmax(dim=-1).amax(dim=-1)
