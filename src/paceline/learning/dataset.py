"""A collection as arrays: each prompt's features and every arm's reward.

Knows rewards and prices, no model and no file. The domain is for tables only; it is not among the
features. Symbols: N prompts, F features, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE, split_arm
from paceline.costs.pricing import ArmPricer
from paceline.errors import ConfigError, StoreError
from paceline.learning.rounds import round_table
from paceline.rewards import alignments, savings
from paceline.selection.choosers import Situation
from paceline.selection.features import STATISTICS
from paceline.store import hash_share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.config import LearningSection
    from paceline.costs import CostTable, Objective
    from paceline.learning.rounds import RoundTable
    from paceline.store.records import CollectedPrompt

MIN_PROMPTS: Final = 8
_MIN_HELD_OUT: Final = 2
TRAINED: Final = 1  # in `Dataset.trained`
UNKNOWN: Final = -1
_SPLIT: Final = "held out: "  # before an id that is hashed


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompts as rows, arms as columns.

    Rates count the tokens after the prefill's own, so `none` has one round per token, and all its
    rounds are empty: it drafts nothing. Rows of one prompt share a name in `groups`; a split keeps
    them together. `spans` names the blocks of features. `rounds` and `costs` give the prices under
    another load, see `seconds_for`.
    """

    arms: tuple[str, ...]  # A
    ids: tuple[str, ...]  # N
    groups: tuple[str, ...]  # N
    domains: tuple[str, ...]  # N
    prompts: tuple[tuple[int, ...], ...]  # N, tokens
    features: np.ndarray  # [N, F] float32
    num_prompt: np.ndarray  # [N] int64, tokens
    num_tokens: np.ndarray  # [N] int64, emitted
    limits: np.ndarray  # [N] int64, maximum number of emitted tokens
    rounds_per_token: np.ndarray  # [N, A] float64
    drafted_per_token: np.ndarray  # [N, A] float64
    empty_per_token: np.ndarray  # [N, A] float64
    calls_per_token: np.ndarray  # [N, A] float64, see `pricing.ArmRates`
    proposed_per_token: np.ndarray  # [N, A] float64
    seconds: np.ndarray  # [N, A] float64, predicted for the whole request, one row in flight
    rewards: np.ndarray  # [N, A] float64
    trained: np.ndarray  # [N, D] int8, of `drafters`: trained on the prompt 1, not 0, unknown -1
    spans: Mapping[str, slice]
    composed: tuple[int, ...]  # places of the cascades among the arms
    rounds: RoundTable
    costs: CostTable
    objective: Objective
    reward: str  # speed, alignment or clocked

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def drafters(self) -> tuple[str, ...]:
        """The arms' drafters without `none`, D."""
        return drafters_of(self.arms)

    @property
    def seen(self) -> np.ndarray:
        """[N] bool: whether any of the drafters was trained on the prompt."""
        return np.asarray((self.trained == TRAINED).any(axis=1))

    def rows(self, chosen: np.ndarray) -> Dataset:
        """Return the prompts where a mask [N] is true, or those at some places [n]."""
        places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        parts: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "rounds":
                parts[field.name] = value.rows(places)
            elif isinstance(value, np.ndarray):
                parts[field.name] = value[places]
            elif isinstance(value, tuple) and field.name not in ("arms", "composed"):
                parts[field.name] = tuple(value[i] for i in places)
        return replace(self, **parts)  # type: ignore[arg-type]

    def part(self, chosen: np.ndarray) -> Dataset:
        """Return the same as `rows`, with the reward `speed` in units of the part's own mean time.

        Parts that learn or judge on their own must not depend on one another's prompts.
        """
        part = self.rows(chosen)
        if part.reward != "speed":
            return part
        return replace(part, rewards=savings(part.seconds, part.arms.index(NONE)))

    def situation(self, rows: int = 1) -> Situation:
        """Return the prompts' situation for choosers. rows: requests in flight."""
        return Situation(self.num_prompt, rows, self.objective, self.limits, self.prompts)

    def seconds_for(self, rows: int) -> np.ndarray:
        """Return the predicted seconds [N, A] of whole requests. rows: requests in flight."""
        return self.rounds.seconds(self.costs.seconds, rows, self.objective)

    def rewards_for(self, rows: int) -> np.ndarray:
        """Return the rewards [N, A] with `rows` requests in flight. Only `speed` depends on the load."""
        if rows == 1 or self.reward != "speed":
            return self.rewards
        return savings(self.seconds_for(rows), self.arms.index(NONE))

    def speedup(self, distribution: np.ndarray) -> float:
        """Return seconds of `none` on all prompts over those of a choice. distribution: [N, A]."""
        none = self.seconds[:, self.arms.index(NONE)]
        return float(none.sum() / (distribution * self.seconds).sum())

    def pricer(self) -> ArmPricer:
        """Return the prices of the dataset's own cost table, for portable choosers."""
        return ArmPricer(self.costs, self.arms)


def build_dataset(
    prompts: Sequence[CollectedPrompt],
    arms: Sequence[str],
    costs: CostTable,
    settings: LearningSection,
) -> tuple[Dataset, list[str]]:
    """Return (dataset, notes for the reader). `arms` must hold `none` and at least one other.

    Raises ConfigError or StoreError if nothing can be learned from it.
    """
    arms = tuple(arms)
    _check_arms(arms, prompts)
    features = stack_features(prompts)
    rounds = round_table(prompts, arms)
    seconds = rounds.seconds(costs.seconds, 1, settings.objective)
    notes: list[str] = []
    if settings.reward == "speed":
        rewards = savings(seconds, arms.index(NONE))
    else:
        rewards, notes = _alignment_rewards(prompts, arms, costs, settings)
    num_tokens = np.array([len(p.output_tokens) for p in prompts])
    after_first = np.maximum(num_tokens - 1, 1)[:, None]
    dataset = Dataset(
        arms=arms,
        ids=tuple(p.id for p in prompts),
        groups=tuple(p.prompt_id for p in prompts),
        domains=tuple(p.domain for p in prompts),
        prompts=tuple(p.prompt_tokens for p in prompts),
        features=features,
        num_prompt=rounds.num_prompt,
        num_tokens=num_tokens,
        limits=np.array([p.max_new_tokens for p in prompts]),
        rounds_per_token=rounds.num_rounds() / after_first,
        drafted_per_token=rounds.num_drafted() / after_first,
        empty_per_token=rounds.num_empty() / after_first,
        calls_per_token=rounds.num_calls() / after_first,
        proposed_per_token=rounds.num_proposed() / after_first,
        seconds=seconds,
        rewards=rewards,
        trained=_stack_trained(prompts, drafters_of(arms)),
        spans=prompts[0].spans or default_spans(features.shape[1]),
        composed=rounds.composed,
        rounds=rounds,
        costs=costs,
        objective=settings.objective,
        reward=settings.reward,
    )
    if (doubt := costs.doubt()) is not None:
        notes.append(f"the cost table: {doubt}")
    return dataset, notes + check_learnable(dataset)


def default_spans(num_features: int) -> dict[str, slice]:
    """Return the blocks of the default encoders' features: hidden states, then statistics."""
    num_hidden = max(num_features - len(STATISTICS), 0)
    return {"target_hidden": slice(0, num_hidden), "text_stats": slice(num_hidden, num_features)}


def drafters_of(arms: Sequence[str]) -> tuple[str, ...]:
    """Return the drafters of arms, without `none`."""
    return tuple(dict.fromkeys(name for name, _ in map(split_arm, arms) if name != NONE))


def _stack_trained(prompts: Sequence[CollectedPrompt], drafters: Sequence[str]) -> np.ndarray:
    """Return [N, D] int8: whether each drafter was trained on each prompt."""
    return np.array(
        [[int(p.trained_on.get(name, UNKNOWN)) for name in drafters] for p in prompts],
        dtype=np.int8,
    ).reshape(len(prompts), len(drafters))


def _check_arms(arms: tuple[str, ...], prompts: Sequence[CollectedPrompt]) -> None:
    if NONE not in arms or len(arms) < 2:
        raise ConfigError(
            f"a policy chooses between '{NONE}' and at least one drafter, there is only "
            f"{', '.join(arms) or 'nothing'}; add a drafter to the configuration"
        )
    if len(prompts) < MIN_PROMPTS:
        raise StoreError(
            f"{len(prompts)} prompts are too few to learn from, at least {MIN_PROMPTS} are needed "
            "(some hundred is better); run `paceline collect PROMPTS` with more prompts"
        )


def stack_features(prompts: Sequence[CollectedPrompt]) -> np.ndarray:
    """Return features [N, F] float32. Raises StoreError if they differ in shape or are not finite."""
    width = prompts[0].features.shape
    for prompt in prompts:
        if prompt.features.shape != width or len(width) != 1:
            raise StoreError(
                f"prompt '{prompt.id}' has features of shape {prompt.features.shape}, "
                f"'{prompts[0].id}' of {width}; collect into a new folder"
            )
        if not np.isfinite(prompt.features).all():
            raise StoreError(
                f"a feature of prompt '{prompt.id}' is not a finite number: the target overflowed; "
                "try another dtype for it and collect into a new folder"
            )
    return np.stack([p.features for p in prompts]).astype(np.float32)


def _alignment_rewards(
    prompts: Sequence[CollectedPrompt],
    arms: tuple[str, ...],
    costs: CostTable,
    settings: LearningSection,
) -> tuple[np.ndarray, list[str]]:
    """Return (rewards [N, A], notes).

    The text of an arm that never writes by itself counts as empty. A drafter's reward is the same at
    every draft length, since neither its text nor its price per token depends on the length.
    """
    drafters = dict.fromkeys(split_arm(arm)[0] for arm in arms)
    writing = {name for prompt in prompts for name in prompt.draft_outputs if name in drafters}
    silent = [name for name in drafters if name != NONE and name not in writing]
    others = sorted({name for prompt in prompts for name in prompt.draft_outputs} - {*drafters})
    if not writing:
        raise StoreError(
            "the reward 'alignment' compares texts the drafters wrote on their own, and the "
            "collection has none; run `paceline collect PROMPTS --alignment`, or use the reward 'speed'"
        )
    rewards = np.empty((len(prompts), len(arms)))
    for row, prompt in zip(rewards, prompts, strict=True):
        missing = sorted(writing - prompt.draft_outputs.keys())
        if missing:
            raise StoreError(
                f"prompt '{prompt.id}' has no text of '{missing[0]}' on its own; run `paceline collect "
                "PROMPTS --alignment` again to finish it"
            )
        found = alignments(
            costs.seconds,
            settings.alpha,
            len(prompt.prompt_tokens),
            prompt.output_tokens,
            {name: prompt.draft_outputs.get(name, ()) for name in drafters if name != NONE},
            settings.metric,
        )
        row[:] = [found[split_arm(arm)[0]] for arm in arms]
    notes = [
        f"'{name}' writes no text of its own in this collection: its similarity counts as 0"
        for name in silent
    ]
    if others:
        notes.append(
            f"the texts of {', '.join(others)} are left out, since these drafters are not configured; "
            "a configuration without drafters learns to choose among texts"
        )
    return rewards, notes


def check_learnable(dataset: Dataset) -> list[str]:
    """Return notes on the rewards. Raises StoreError if there is no choice to learn."""
    rewards = dataset.rewards
    if not np.isfinite(rewards).all() or not np.isfinite(dataset.seconds).all():
        raise StoreError("a predicted time is not a finite number; run `paceline profile` again")
    return check_rewards(dataset)


def check_rewards(dataset: Dataset) -> list[str]:
    """Return a note if one arm is best everywhere. Raises StoreError if all arms are equally good."""
    rewards = dataset.rewards
    if np.ptp(rewards, axis=1).max() <= 1e-9 * np.abs(rewards).max():
        raise StoreError(
            "every arm has the same reward on every prompt, so there is nothing to choose; add "
            "drafters that differ, or collect longer outputs"
        )
    winners = rewards.argmax(axis=1)
    if (rewards >= rewards.max(axis=1, keepdims=True))[:, winners[0]].all():
        return [f"'{dataset.arms[winners[0]]}' is best on every prompt: one arm would do"]
    return []


def is_held_out(prompt: CollectedPrompt, share: float) -> bool:
    """Return whether `split` puts a prompt into the held-out part."""
    return hash_share(f"{_SPLIT}{prompt.prompt_id}") < share


def split(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Return (training part, held-out part), by a hash of the prompt's id.

    The order of prompts does not matter, and all rows of a prompt are in one part. Raises StoreError
    if a part would have too few prompts.
    """
    # not by the id's own hash: prompts are often selected by it, and then all are in one part
    held_out = np.array([hash_share(f"{_SPLIT}{group}") < share for group in dataset.groups])
    num_held_out = int(held_out.sum())
    if num_held_out < _MIN_HELD_OUT or len(dataset) - num_held_out < MIN_PROMPTS - _MIN_HELD_OUT:
        raise StoreError(
            f"of {len(dataset)} prompts {num_held_out} would be held out: too few are left to "
            "learn or to test on; collect more prompts or change learning.held_out"
        )
    return dataset.part(~held_out), dataset.part(held_out)
