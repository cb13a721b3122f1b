"""Records of a collection as its readers see them: prompts, outputs and replays, joined by id.

Symbols: T output tokens, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from paceline.contracts import GREEDY, SamplingParams


def sampling_label(sampling: SamplingParams) -> str:
    """Return the label that a sampling adds to a prompt's id: `@t0.8,p0.95`; empty for greedy.

    It has no seed: a prompt's seed follows from its id.
    """
    if sampling.temperature == 0.0:
        return ""
    parts = [f"t{sampling.temperature:g}"]
    parts += [f"k{sampling.top_k}"] if sampling.top_k else []
    parts += [f"p{sampling.top_p:g}"] if sampling.top_p < 1.0 else []
    parts += [f"m{sampling.min_p:g}"] if sampling.min_p else []
    return "@" + ",".join(parts)


def seed_sampling(prompt_id: str, sampling: SamplingParams) -> tuple[str, SamplingParams]:
    """Return (the row's id, the sampling with the prompt's own seed)."""
    label = sampling_label(sampling)
    if not label:
        return prompt_id, sampling
    key = f"{sampling.seed}\0{prompt_id}\0{label}".encode()
    seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 2
    # noise keyed by seed and position gives the same text for every arm
    return prompt_id + label, replace(sampling, seed=seed, method="invariant")


@dataclass(frozen=True, slots=True)
class ReplayedDrafter:
    """The drafted and accepted tokens of one drafter along one trajectory, at its full draft length.

    everywhere: the table has the round that would start at each position 1 to T - 1 (tokens emitted so
    far); otherwise it has consecutive rounds from the first position on. proposed: for each round the
    tokens that the price of the proposal depends on, if these are not all drafted ones. under_load: of
    rounds that follow from prices, returns those with a number of rows in flight.
    """

    table: np.ndarray  # [T - 1, 2] or [rounds, 2] int
    everywhere: bool
    proposed: np.ndarray | None = None  # [rounds] int
    under_load: Callable[[int], ReplayedDrafter] | None = field(
        default=None, compare=False, repr=False
    )


@dataclass(frozen=True, slots=True)
class DraftNodes:
    """A lookup's drafts at every position of an output, their tokens one position after the other.

    lengths: tokens of each draft. evidence: the class of each token. parents: its parent's place in its
    own draft, -1 for none. kept: whether it equals the output, together with its parents.
    """

    lengths: np.ndarray  # [T - 1] int
    evidence: np.ndarray  # [sum of lengths] int
    parents: np.ndarray  # as evidence
    kept: np.ndarray  # as evidence, bool

    def is_tested(self) -> np.ndarray:
        """Return whether each token's parents equal the output, so that the token decides."""
        first = np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        tested: np.ndarray = (self.parents < 0) | self.kept[first + np.maximum(self.parents, 0)]
        return tested


@dataclass(frozen=True, slots=True)
class CollectedPrompt:
    """One prompt of a collection under one sampling: the target's output and the drafters' replays."""

    id: str  # the prompt's own id, followed by the sampling's label if it is not greedy
    domain: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]  # T, the trajectory
    max_new_tokens: int
    features: np.ndarray  # [F] float32
    replays: dict[str, ReplayedDrafter]
    draft_outputs: dict[str, tuple[int, ...]]  # drafter -> its own greedy output, if collected
    # drafter -> (match, confidence) by position, of chains; see drafting's PositionScores
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    nodes: dict[str, DraftNodes] = field(default_factory=dict)  # by lookup drafter
    sampling: SamplingParams = GREEDY
    spans: Mapping[str, slice] = field(default_factory=dict)  # encoder -> its part of the features
    # drafter -> whether it was trained on this prompt; without an entry that is unknown
    trained_on: Mapping[str, bool] = field(default_factory=dict)

    @property
    def prompt_id(self) -> str:
        """The prompt's own id, which all its samplings share; splits must use it."""
        return self.id.removesuffix(sampling_label(self.sampling))
