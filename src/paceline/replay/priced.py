"""Rounds of arms that depend on prices, from replays that were stored without prices.

`composed` has those of cascades. Of an arm that stops by expected gain a collection stores the rounds
at full length and the scores by position; here its rule ends each draft by a cost table. This module
knows no model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from paceline.drafting.catalog import check_settings
from paceline.drafting.chain_replay import ChainReplay
from paceline.drafting.draft_length import ExpectedGainStop, StopSettings
from paceline.drafting.draft_replay import PositionScores
from paceline.replay.composed import calibrate, compose
from paceline.replay.rounds import look_ahead
from paceline.store.records import ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import Config
    from paceline.costs.table import CostTable
    from paceline.drafting.cascade.calibration import Calibration
    from paceline.drafting.draft_length import StopRule
    from paceline.store.records import CollectedPrompt


def price_rounds(
    prompts: Sequence[CollectedPrompt],
    config: Config,
    costs: CostTable,
    calibration: Calibration | None = None,
) -> list[CollectedPrompt]:
    """Return the prompts with the rounds of all arms that follow from prices.

    calibration: the chances of cascades' parts, by default those of these prompts.
    """
    stopped = price_stops(prompts, config, costs)
    if calibration is None:
        calibration = calibrate(stopped, config)
    return compose(stopped, config, costs, calibration)


def price_stops(
    prompts: Sequence[CollectedPrompt], config: Config, costs: CostTable
) -> list[CollectedPrompt]:
    """Return the prompts with the rounds of the configuration's priced arms under a cost table.

    The accepted tokens are exact; the number drafted after a first wrong token is estimated from the
    confidences along the text, see `ChainReplay`.
    """
    rules = _priced_rules(config, costs)
    if not rules:
        return list(prompts)
    return [
        replace(
            prompt,
            replays=prompt.replays
            | {
                arm: ReplayedDrafter(stopped_ahead(prompt, arm, rule, length), everywhere=True)
                for arm, (rule, length) in rules.items()
                if arm in prompt.scores
            },
        )
        for prompt in prompts
    ]


def _priced_rules(config: Config, costs: CostTable) -> dict[str, tuple[StopRule, int]]:
    """Return arm -> (its rule, its maximum draft length), of arms that stop by expected gain."""
    rules: dict[str, tuple[StopRule, int]] = {}
    for arm, section in config.drafters.items():
        settings = check_settings(arm, section)
        if isinstance(settings, StopSettings) and settings.stop == "expected":
            length = settings.num_draft_tokens
            rules[arm] = (ExpectedGainStop(costs, arm, length), length)
    return rules


def stopped_ahead(
    prompt: CollectedPrompt, arm: str, rule: StopRule, num_draft_tokens: int
) -> np.ndarray:
    """Return [T - 1, 2] drafted and accepted of a chain drafter under a stop rule, from its scores."""
    match, confidence = prompt.scores[arm]
    num_output, num_prompt = len(prompt.output_tokens), len(prompt.prompt_tokens)
    rooms = np.full(num_output, num_draft_tokens)
    if len(match) < num_output:  # the drafter's own context ended before the text did
        rooms = np.maximum(len(match) - np.arange(num_output), 0)
    unknown = np.full(len(match), np.nan, dtype=np.float32)
    scores = PositionScores(match, unknown, unknown, confidence)
    draft_replay = ChainReplay(scores, rooms, num_draft_tokens, rule, num_prompt)
    return look_ahead(draft_replay, num_output, prompt.max_new_tokens)
