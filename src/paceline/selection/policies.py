"""Policies: which arm a request gets. Arms are names here.

`NetworkPolicy` is learned; `FixedPolicy` and `RandomPolicy` are what it is compared with. A
decision depends on the request and the load alone, never on requests before it or tokens to come.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from paceline.contracts import Context, Decision
from paceline.errors import ArtefactError, ConfigError
from paceline.selection.features import feature_vector
from paceline.selection.network import softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.selection.network import PolicyNetwork


class Policy(ABC):
    """Chooses among `arms`; `id` goes into the decision log and names what decided."""

    def __init__(self, arms: Sequence[str], id: str) -> None:
        if not arms or len(set(arms)) != len(arms):
            raise ConfigError(f"a policy needs distinct arms, got {list(arms)}")
        self.arms = tuple(arms)
        self.id = id

    @abstractmethod
    def choose(self, context: Context) -> Decision:
        """The arm for one request, decided after its prefill."""


class FixedPolicy(Policy):
    """Always the same arm."""

    def __init__(self, arm: str) -> None:
        super().__init__((arm,), f"fixed:{arm}")

    def choose(self, context: Context) -> Decision:
        return Decision(self.arms[0], 1.0, {self.arms[0]: 1.0}, self.id)


class RandomPolicy(Policy):
    """Every arm equally often; a prompt and a seed give the same arm in any order of requests."""

    def __init__(self, arms: Sequence[str], seed: int = 0) -> None:
        super().__init__(arms, f"random:{seed}")
        self._key = str(seed).encode()

    def choose(self, context: Context) -> Decision:
        tokens = np.asarray(context.prompt_tokens, dtype="<i8").tobytes()
        digest = hashlib.sha256(self._key + b"\0" + tokens).digest()
        arm = self.arms[int.from_bytes(digest[:8], "big") % len(self.arms)]
        share = 1.0 / len(self.arms)
        return Decision(arm, share, dict.fromkeys(self.arms, share), self.id)


class NetworkPolicy(Policy):
    """The arm with the largest logit. The propensity is 1, since the choice is deterministic; the
    scores are the softmax over arms, which training sampled from.
    """

    def __init__(self, network: PolicyNetwork, arms: Sequence[str], id: str) -> None:
        super().__init__(arms, id)
        if network.num_arms != len(self.arms):
            raise ArtefactError(
                f"the policy's network has {network.num_arms} outputs for {len(self.arms)} arms; "
                "run `paceline learn`"
            )
        self.network = network

    def choose(self, context: Context) -> Decision:
        features = feature_vector(context)
        if features.shape[0] != self.network.num_features:
            raise ArtefactError(
                f"the policy was learned on {self.network.num_features} features, the target gives "
                f"{features.shape[0]}; run `paceline learn`"
            )
        probabilities = softmax(self.network.logits(features))
        scores = dict(zip(self.arms, probabilities.tolist(), strict=True))
        return Decision(self.arms[int(probabilities.argmax())], 1.0, scores, self.id)
