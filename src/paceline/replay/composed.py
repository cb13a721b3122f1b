"""Rounds of cascades, from the replays of their parts: which part drafts depends on prices.

A collection stores the drafts of every lookup and the accepted tokens of every model at each position;
here the cascade's rule walks over them with a cost table. The module runs no model. Symbols: N prompts,
T output tokens, L lookups, M models, R rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from paceline.contracts import identity_of_arms
from paceline.drafting.cascade import kernels
from paceline.drafting.cascade.calibration import Chances, PartReplays, fit_chances, stack_nodes
from paceline.drafting.cascade.drafter import Cascade
from paceline.drafting.cascade.prices import BUCKET, read_prices
from paceline.drafting.cascade.settings import CascadeSettings
from paceline.drafting.catalog import check_settings
from paceline.drafting.draft_length import StopSettings
from paceline.drafting.suffix_lookup import SuffixLookupSettings
from paceline.errors import StoreError
from paceline.store.records import DraftNodes, ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.config import Config
    from paceline.costs.table import CostTable
    from paceline.drafting.cascade.calibration import Calibration
    from paceline.drafting.cascade.prices import Prices
    from paceline.store.records import CollectedPrompt


@dataclass(frozen=True, slots=True)
class CascadeParts:
    """A configured cascade: its parts by kind, and the length of its drafts."""

    name: str
    lookups: tuple[str, ...]
    models: tuple[str, ...]
    sure: tuple[bool, ...]  # of the models: whether their own probabilities end their chains
    num_draft_tokens: int

    @property
    def parts(self) -> tuple[str, ...]:
        return self.lookups + self.models


def cascades_of(config: Config) -> list[CascadeParts]:
    """Return the configuration's cascades."""
    settings = {name: check_settings(name, section) for name, section in config.drafters.items()}
    found = []
    for name, own in settings.items():
        if isinstance(own, CascadeSettings):
            lookups = tuple(
                p for p in own.parts if isinstance(settings.get(p), SuffixLookupSettings)
            )
            models = tuple(p for p in own.parts if p not in lookups)
            sure = tuple(
                isinstance(s := settings.get(m), StopSettings) and s.stop == "fixed" for m in models
            )
            found.append(CascadeParts(name, lookups, models, sure, own.num_draft_tokens))
    return found


def stored_drafters(config: Config) -> list[str]:
    """Return the drafters that a collection has replays of: all but cascades."""
    composed = {cascade.name for cascade in cascades_of(config)}
    return [name for name in config.drafters if name not in composed]


def with_cascades(identities: Mapping[str, str], config: Config) -> dict[str, str]:
    """Return identity lines of drafters, with those of the configuration's cascades."""
    lines = dict(identities)
    for cascade in cascades_of(config):
        facts = {
            "kind": Cascade.kind,
            "num_draft_tokens": cascade.num_draft_tokens,
            "parts": {part: identities[part] for part in cascade.parts},
        }
        lines |= identity_of_arms({cascade.name: facts})
    return lines


def calibrate(prompts: Sequence[CollectedPrompt], config: Config) -> Calibration:
    """Return the chances of every cascade's parts on the prompts, for `compose` and for serving.

    A model's are those on prompts where it is the best of all cascades' models, since a policy gives
    it such prompts; its other prompts count a tenth.
    """
    cascades = cascades_of(config)
    models = sorted({model for cascade in cascades for model in cascade.models})
    kept = np.array(
        [[_accepted_share(prompt, model) for model in models] for prompt in prompts]
    ).reshape(len(prompts), len(models))
    best = kept >= kept.max(axis=1, keepdims=True, initial=0.0)
    calibration = {}
    for cascade in cascades:
        columns = [models.index(model) for model in cascade.models]
        replays = [
            part_replays(prompt, cascade, np.where(best[i, columns], 1.0, _OTHERS))
            for i, prompt in enumerate(prompts)
        ]
        chances = fit_chances(replays, len(cascade.lookups), len(cascade.models))
        calibration[cascade.name] = (cascade.parts, chances)
    return calibration


_OTHERS = 0.1  # weight of prompts for which another model is better


def _accepted_share(prompt: CollectedPrompt, model: str) -> float:
    table = _replay_of(prompt, model).table
    return float((table[:, 1] > 0).mean()) if len(table) else 0.0


def compose(
    prompts: Sequence[CollectedPrompt],
    config: Config,
    costs: CostTable,
    calibration: Calibration,
) -> list[CollectedPrompt]:
    """Return the prompts with the rounds of the configuration's cascades under a cost table.

    Raises StoreError if a part was not replayed.
    """
    composed = list(prompts)
    for cascade in cascades_of(config):
        walker = _Walker(cascade, chances_of(calibration, cascade), costs)
        composed = [
            replace(prompt, replays=prompt.replays | {cascade.name: walker.at_rows(prompt, 1)})
            for prompt in composed
        ]
    return composed


class _Walker:
    """Walks of one cascade along prompts, with any number of rows in flight."""

    def __init__(self, cascade: CascadeParts, chances: Chances, costs: CostTable) -> None:
        self._cascade, self._chances, self._costs = cascade, chances, costs
        self._prices: dict[int, Prices] = {}

    def at_rows(self, prompt: CollectedPrompt, rows: int) -> ReplayedDrafter:
        if rows not in self._prices:
            own = self._cascade
            self._prices[rows] = read_prices(
                self._costs, own.name, own.models, own.num_draft_tokens, rows
            )
        walked = walk_cascade(prompt, self._cascade, self._chances, self._prices[rows])
        return replace(walked, under_load=partial(self.at_rows, prompt))


def chances_of(calibration: Calibration, cascade: CascadeParts) -> Chances:
    """Return a cascade's chances, those assumed if it was not calibrated with these parts."""
    parts, chances = calibration.get(cascade.name, ((), None))
    if chances is None or parts != cascade.parts:
        return Chances.assumed(len(cascade.lookups), len(cascade.models))
    return chances


def walk_cascade(
    prompt: CollectedPrompt, cascade: CascadeParts, chances: Chances, prices: Prices
) -> ReplayedDrafter:
    """Return a cascade's rounds on a prompt."""
    replays = part_replays(prompt, cascade, np.ones(len(cascade.models)))
    num_positions = max(len(prompt.output_tokens) - 1, 0)
    evidence, parents, kept, lengths = stack_nodes(replays.nodes, num_positions)
    rounds = kernels.walk(
        evidence,
        parents,
        kept,
        lengths,
        replays.drafted,
        replays.accepted,
        replays.sure,
        chances.tables,
        chances.prospects,
        chances.if_sure,
        prices.verifying,
        prices.drafting,
        prices.reading,
        len(prompt.prompt_tokens),
        prompt.max_new_tokens,
        BUCKET,
    )
    return ReplayedDrafter(rounds[:, :2], everywhere=False, proposed=rounds[:, 2])


def part_replays(prompt: CollectedPrompt, cascade: CascadeParts, weight: np.ndarray) -> PartReplays:
    """Return the replays of a cascade's parts. weight: of the models in a calibration, [M]."""
    shape = (len(cascade.models), max(len(prompt.output_tokens) - 1, 0), 2)
    tables = [_replay_of(prompt, model).table for model in cascade.models]
    stacked = np.array(tables, dtype=np.int64).reshape(shape)
    return PartReplays(
        nodes=[_nodes_of(prompt, lookup) for lookup in cascade.lookups],
        drafted=np.ascontiguousarray(stacked[..., 0]),
        accepted=np.ascontiguousarray(stacked[..., 1]),
        sure=_probabilities(prompt, cascade, shape[:2]),
        weight=weight,
    )


def _probabilities(
    prompt: CollectedPrompt, cascade: CascadeParts, shape: tuple[int, int]
) -> np.ndarray:
    """Return each model's probability for its token at every position, -1 where it is not used."""
    sure = np.full(shape, -1.0)
    # a chain that is drawn with the judge's noise does not end by its probabilities
    for place, model in enumerate(cascade.models) if prompt.sampling.temperature == 0.0 else ():
        confidence = prompt.scores.get(model, (None, np.zeros(0)))[1][1:]
        if cascade.sure[place] and len(confidence):
            sure[place, : len(confidence)] = confidence[: shape[1]]
    return sure


def _replay_of(prompt: CollectedPrompt, part: str) -> ReplayedDrafter:
    found = prompt.replays.get(part)
    if found is not None and not found.everywhere:
        raise StoreError(
            f"a cascade's part '{part}' has a replay at some positions only, as its kind has; a policy "
            "cannot be learned with it: take it out of the cascade's parts"
        )
    if found is None:
        raise StoreError(
            f"a cascade's part '{part}' has no replay at every position of '{prompt.id}'; run "
            "`paceline collect PROMPTS` again with this configuration"
        )
    return found


def _nodes_of(prompt: CollectedPrompt, lookup: str) -> DraftNodes:
    nodes, table = prompt.nodes.get(lookup), _replay_of(prompt, lookup).table
    if nodes is None:
        if table[:, 0].any():
            raise StoreError(
                f"the replay of '{lookup}' on '{prompt.id}' has no evidence of its drafts, which a "
                "cascade needs; delete this replay and run `paceline collect PROMPTS` again"
            )
        empty = np.zeros(0, dtype=np.int64)
        nodes = DraftNodes(np.zeros(len(table), dtype=np.int64), empty, empty, empty.astype(bool))
    return nodes
