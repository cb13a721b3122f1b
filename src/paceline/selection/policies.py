"""Policies: the choice of a request's arm. Arms are names here.

A policy gives its chooser the features of a request and takes the arm that the chooser prefers, or
draws one where the chooser gives several arms a probability. A decision depends only on the request
and the load, never on earlier requests or later tokens.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from paceline.config import DEFAULT_OBJECTIVE
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
    """A chooser with its features and its objective.

    id: the policy's name in the decision log. seed: the seed of drawn choices, which also
    depend on the request's id and prompt, so a decision can be repeated. objective: as in
    `costs.pricing`. num_features: the number that the chooser was learned on, None for any. notes:
    remarks about a loaded policy, for the user. Raises ConfigError unless the chooser's arms are
    distinct.
    """

    def __init__(
        self,
        chooser: Chooser,
        id: str,
        *,
        seed: int = 0,
        objective: Objective = DEFAULT_OBJECTIVE,
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
        """Return the arm for one request, after its prefill, with its propensity.

        The scores of a portable chooser are predicted speed-ups over `none`, and its decision also
        has the predicted seconds per token. The scores of other choosers are shares. Raises
        ArtefactError if the target gives another number of features than the policy learned on.
        """
        features = self._encode(context)  # [F]
        if self._num_features not in (None, len(features)):
            raise ArtefactError(
                f"the policy was learned on {self._num_features} features, the target gives "
                f"{len(features)}; run `paceline learn`"
            )
        situation = self._situation(context)
        seconds: dict[str, float] = {}
        seconds_in_rounds: dict[str, float] = {}
        if isinstance(self.chooser, PortableChooser):
            work = self.chooser.work(features[None], situation)
            predicted = price_work(self.chooser.pricer, work, situation)  # [1, A]
            preferences = self.chooser.speeds(predicted)
            seconds = dict(zip(self.arms, predicted[0].tolist(), strict=True))
            in_rounds = price_work(self.chooser.pricer, work, situation, whole=False)
            seconds_in_rounds = dict(zip(self.arms, in_rounds[0].tolist(), strict=True))
        else:
            preferences = self.chooser.preferences(features[None], situation)
        distribution = self.chooser.distribution(preferences)[0]  # [A]
        if distribution.max() >= 1.0:
            chosen = int(distribution.argmax())
        else:
            u = uniform_draw(context, f"{self._seed}\0")
            chosen = int(np.searchsorted(distribution.cumsum()[:-1], u, side="right"))
        return Decision(
            self.arms[chosen],
            float(min(distribution[chosen], 1.0)),
            dict(zip(self.arms, self.chooser.scores(preferences)[0].tolist(), strict=True)),
            self.id,
            features,
            seconds,
            seconds_in_rounds,
        )

    def _situation(self, context: Context) -> Situation:
        limit = context.max_new_tokens
        return Situation(
            num_prompt=np.array([len(context.prompt_tokens)]),
            rows=context.rows_in_flight,
            objective=self.objective,
            limits=None if limit is None else np.array([limit]),
            prompts=(context.prompt_tokens,),
            drafters_in_flight=context.drafters_in_flight,
        )


def uniform_draw(context: Context, prefix: str = "") -> float:
    """Return a number in [0, 1) that depends only on the request's id and prompt, and the prefix."""
    digest = hashlib.sha256(f"{prefix}{context.request_id}\0".encode())
    digest.update(np.asarray(context.prompt_tokens, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest()[:8], "big") / 2.0**64
