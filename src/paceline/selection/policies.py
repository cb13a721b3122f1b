"""Policies: which arm a request gets. Arms are names here.

A policy gives its chooser the features of a request and takes the arm that the chooser prefers, or
now and then another one where it is told to explore. A decision depends on the request and the load
alone, never on requests before it or tokens to come.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from paceline.contracts import Context, Decision
from paceline.errors import ArtefactError, ConfigError
from paceline.selection.choosers import PortableChooser, Situation
from paceline.selection.choosers.base import price_work
from paceline.selection.features import feature_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.costs import Objective
    from paceline.selection.choosers import Chooser

    Encode = Callable[[Context], np.ndarray]  # a request -> [F]


class Policy:
    """Chooses among its chooser's `arms`; `id` goes into the decision log and names what decided.

    explore: the share of requests that get any arm, each as often as another; which requests hangs
    on `seed`, the request's id and its prompt, so a decision can be repeated. objective: what it is
    to be fast at, see `costs.pricing`. num_features: what the chooser was learned on; None takes any
    number. notes: what is worth knowing of a loaded policy.
    """

    def __init__(
        self,
        chooser: Chooser,
        id: str,
        *,
        seed: int = 0,
        objective: Objective = 0.0,
        encode: Encode = feature_vector,
        num_features: int | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        arms = chooser.arms
        if not arms or len(set(arms)) != len(arms):
            raise ConfigError(f"a policy needs distinct arms, got {list(arms)}")
        self.chooser = chooser
        self.arms = arms
        self.id = id
        self.notes = tuple(notes)
        self.objective = objective
        self._seed = seed
        self._encode = encode
        self._num_features = num_features

    def choose(self, context: Context) -> Decision:
        """The arm for one request, decided after its prefill, with its propensity.

        The scores are predicted speeds over `none` where the chooser is portable, else shares; such
        a one's decision has the predicted seconds per token beside them.
        """
        return self.decide(self._encode(context), context)

    def decide(self, features: np.ndarray, context: Context) -> Decision:
        """The same with the features [F] already at hand."""
        if self._num_features not in (None, len(features)):
            raise ArtefactError(
                f"the policy was learned on {self._num_features} features, the target gives "
                f"{len(features)}; run `paceline learn`"
            )
        limit = context.max_new_tokens
        situation = Situation(
            num_prompt=np.array([len(context.prompt_tokens)]),
            rows=context.rows_in_flight,
            objective=self.objective,
            limits=None if limit is None else np.array([limit]),
            prompts=(context.prompt_tokens,),
        )
        seconds: dict[str, float] = {}
        in_rounds: dict[str, float] = {}
        if isinstance(self.chooser, PortableChooser):
            work = self.chooser.work(features[None], situation)
            predicted = price_work(self.chooser.pricer, work, situation)  # [1, A]
            preferences = self.chooser.speeds(predicted)
            seconds = dict(zip(self.arms, predicted[0].tolist(), strict=True))
            rounds = price_work(self.chooser.pricer, work, situation, whole=False)
            in_rounds = dict(zip(self.arms, rounds[0].tolist(), strict=True))
        else:
            preferences = self.chooser.preferences(features[None], situation)
        distribution = self.chooser.distribution(preferences)[0]  # [A]
        place = (
            int(distribution.argmax())
            if distribution.max() >= 1.0
            else self._draw(distribution, context)
        )
        scores = dict(zip(self.arms, self.chooser.scores(preferences)[0].tolist(), strict=True))
        propensity = float(min(distribution[place], 1.0))
        return Decision(self.arms[place], propensity, scores, self.id, features, seconds, in_rounds)

    def _draw(self, distribution: np.ndarray, context: Context) -> int:
        """A place by its probability, distribution [A]; the same for the same request, in any order."""
        digest = hashlib.sha256(f"{self._seed}\0{context.request_id}\0".encode())
        digest.update(np.asarray(context.prompt_tokens, dtype="<i8").tobytes())
        point = int.from_bytes(digest.digest()[:8], "big") / 2.0**64
        return int(np.searchsorted(distribution.cumsum()[:-1], point, side="right"))
