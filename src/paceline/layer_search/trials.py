"""Trials of subsets of sub-layers: the seconds per token without them, predicted or by the clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.bench.cost_measurement import plain_driver
from paceline.contracts import NONE, Request
from paceline.drafting.layer_skip import LayerSkip
from paceline.layer_search.costs import SubsetPricer
from paceline.layer_search.subset_replay import SubsetReplay, rounds_of
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Parts
    from paceline.contracts import Completion
    from paceline.costs import CostTable
    from paceline.layer_search.settings import SearchSettings
    from paceline.layer_search.subset_replay import Trajectory
    from paceline.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Trial:
    """A subset with its seconds per emitted token, block efficiency and acceptance."""

    skip_attention: Sequence[int]
    skip_mlp: Sequence[int]
    seconds_per_token: float
    block_efficiency: float
    acceptance: float

    @property
    def subset(self) -> LayerSubset:
        return LayerSubset(frozenset(self.skip_attention), frozenset(self.skip_mlp))

    @classmethod
    def of(cls, subset: LayerSubset, seconds: float, rounds: Sequence[np.ndarray]) -> Trial:
        """Return the trial of a subset. rounds: [n, 2] drafted and accepted, of each output."""
        drafted, accepted = np.concatenate(rounds).T
        return cls(
            tuple(sorted(subset.attention)),
            tuple(sorted(subset.mlp)),
            seconds,
            float((accepted + 1).mean()),
            float(accepted.sum() / max(1, drafted.sum())),
        )


class PredictedTrials:
    """Trials by replay on recorded outputs, priced by a cost table."""

    def __init__(
        self,
        target: LanguageModel,
        trajectories: Sequence[Trajectory],
        settings: SearchSettings,
        costs: CostTable,
    ) -> None:
        self._settings = settings
        self._pricer = SubsetPricer(costs, target.num_layers)
        self._replay = SubsetReplay(target, trajectories, settings.num_draft_tokens)

    def plain_seconds_per_token(self) -> float:
        return self._pricer.plain

    def run(self, subset: LayerSubset) -> Trial:
        rounds = rounds_of(self._replay.scores(subset), self._settings)
        return Trial.of(subset, self._pricer.seconds_per_token(rounds, subset), rounds)

    def close(self) -> None:
        self._replay.close()


class TimedTrials:
    """Trials by decoding against the clock, one request at a time; prefill is not counted."""

    def __init__(
        self, parts: Parts, trajectories: Sequence[Trajectory], settings: SearchSettings
    ) -> None:
        self._parts, self._trajectories, self._settings = parts, trajectories, settings

    def plain_seconds_per_token(self) -> float:
        return self._decode(None)[0]

    def run(self, subset: LayerSubset) -> Trial:
        seconds, completions = self._decode(subset)
        rounds = [np.array([(r.drafted, r.accepted) for r in c.rounds]) for c in completions]
        return Trial.of(subset, seconds, rounds)

    def _decode(self, subset: LayerSubset | None) -> tuple[float, list[Completion]]:
        parts, arm = self._parts, NONE
        drafters = {NONE: parts.drafters[NONE]}
        if subset is not None:
            arm = "layer_skip"
            drafters[arm] = LayerSkip(arm, parts.target, subset, self._settings.of_drafter())
        driver = plain_driver(parts, 1, drafters)
        completions = [
            next(driver.generate([Request(str(i), t.prompt, len(t.output), drafter=arm)]))
            for i, t in enumerate(self._trajectories)
        ]
        seconds = sum(c.seconds_total - c.seconds.prefill for c in completions)
        return seconds / sum(len(c.token_ids) - 1 for c in completions), completions

    def close(self) -> None:
        """Do nothing: between trials nothing is held."""
