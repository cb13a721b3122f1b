"""Several drafters' proposals in one tree, so that a round keeps the best of them.

After SpecInfer's merged trees (arXiv 2305.09781), with a budget of nodes filled by expected acceptance
as in OPT-Tree (arXiv 2406.17276), here with each part's acceptance in the request so far. A tree is
judged by the target's own draws and has no probabilities, so parts are asked for what they find most
likely where sampling would have them draw; under `invariant` they draw with the judge's noise.
Symbols: a = a part's acceptance, the odds that one more of its tokens is right.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS
from paceline.contracts import GREEDY, NONE, Drafts, identity_of_arms
from paceline.drafting.base import Drafter, Foresight, Needs, pad_drafts
from paceline.drafting.contract import blaming, read_drafts, read_length
from paceline.drafting.foresight import CachedForesight, SimulatedForesight, num_on_text
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.drafting.base import Surroundings
    from paceline.models.language_model import LanguageModel

# what a part's acceptance is taken for before it has proposed, and how many tokens that counts as
_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0


class UnionSettings(BaseModel):
    """parts: drafters configured before this one; num_draft_tokens: most nodes of the tree."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: tuple[str, ...] = Field(min_length=2)
    num_draft_tokens: int = Field(default=16, ge=1, le=MAX_DRAFT_TOKENS)

    @model_validator(mode="after")
    def _parts_differ(self) -> UnionSettings:
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"a part is named twice: {', '.join(self.parts)}")
        return self


@dataclass(frozen=True, slots=True)
class Proposal:
    """One part's draft for a row, and its acceptance. parents as in `Drafts`, a chain's too."""

    tokens: list[int]
    parents: list[int]
    acceptance: float


def merge(proposals: Sequence[Proposal], num_nodes: int) -> tuple[list[int], list[int]]:
    """(tokens, parents) of one tree: the nodes most likely to be accepted, equal ones joined.

    A part gives its k-th child of a node a/k of the node's own odds; a node that several parts propose
    is missed only if all of them miss. Odds never rise on the way down, so the best nodes are a tree.
    """
    tokens: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    missed: list[float] = []  # the odds that a node is wrong
    for proposal in proposals:
        place: list[int] = []  # of the proposal's nodes in the merged tree
        odds: list[float] = []
        born: dict[int, int] = {}
        for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
            rank = born[parent] = born.get(parent, 0) + 1
            above = odds[parent] if parent >= 0 else 1.0
            odds.append(above * proposal.acceptance / rank)
            root = place[parent] if parent >= 0 else -1
            node = children.setdefault((root, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(root)
                missed.append(1.0)
            if node not in place:  # the same twice is no likelier
                missed[node] *= 1.0 - odds[-1]
            place.append(node)
    # a stable sort keeps a parent before its child where they are equally likely
    kept = sorted(sorted(range(len(tokens)), key=lambda node: missed[node])[:num_nodes])
    number = {node: k for k, node in enumerate(kept)} | {-1: -1}
    return [tokens[node] for node in kept], [number[parents[node]] for node in kept]


@dataclass(slots=True)
class _Record:
    """How one part has fared in one row."""

    right: float = 0.0
    wrong: float = 0.0
    tokens: list[int] = field(default_factory=list)  # its last proposal
    parents: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        tried = self.right + self.wrong
        return (self.right + _PRIOR * _PRIOR_WEIGHT) / (tried + _PRIOR_WEIGHT)

    def learn(self, written: Sequence[int]) -> None:
        """Score the last proposal by what the target wrote in its place."""
        matched = num_on_text(self.tokens, self.parents, written)
        self.right += matched
        # nothing is known of tokens behind the text's end or the proposal's own
        self.wrong += matched < min(len(written), _height(self.parents))
        self.tokens, self.parents = [], []


def _height(parents: Sequence[int]) -> int:
    levels: list[int] = []
    for parent in parents:
        levels.append(1 if parent < 0 else levels[parent] + 1)
    return max(levels, default=0)


@dataclass(slots=True)
class _State:
    records: list[_Record]  # of the parts
    num_tokens: int = 0  # the row's at the last proposal
    num_prepared: int = 0  # parts that have their prefill behind them


@dataclass(frozen=True, slots=True)
class _GreedyView:
    """A row as if it were greedy."""

    id: int
    tokens: Sequence[int]
    num_prompt: int
    slot: int
    num_cached: int
    sampling: SamplingParams = GREEDY


def _seen_by_parts(row: RowView) -> RowView:
    if row.sampling.method in ("greedy", "invariant"):
        return row
    return _GreedyView(row.id, row.tokens, row.num_prompt, row.slot, row.num_cached)


class Union(Drafter):
    """Several drafters' proposals, merged into one tree.

    The parts are arms of their own too: a row has one arm at a time, so their states never meet.
    """

    kind: ClassVar[str] = "union"
    replays_everywhere = False  # what its parts had right in earlier rounds weighs them
    Settings: ClassVar[type[UnionSettings]] = UnionSettings

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Drafter],
        num_draft_tokens: int = 16,
        target: LanguageModel | None = None,
    ) -> None:
        """target: for the replay of parts that draft with its weights."""
        super().__init__(name, num_draft_tokens)
        self._target = target
        self.parts = dict(parts)
        needs = [part.needs for part in self.parts.values()]
        self.needs = Needs(  # type: ignore[misc] # of its parts, which the class does not know
            same_vocabulary=any(n.same_vocabulary for n in needs),
            target_weights=any(n.target_weights for n in needs),
        )
        self._states: dict[int, _State] = {}

    @classmethod
    def build(cls, name: str, settings: UnionSettings, around: Surroundings) -> Union:
        parts = {part: _part(name, part, around.drafters) for part in settings.parts}
        return cls(name, parts, settings.num_draft_tokens, around.target)

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states[row.id] = _State([_Record() for _ in self.parts], len(row.tokens))
        seen = [_seen_by_parts(row) for row in rows]
        for part in self.parts.values():
            part.start(seen)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        """One part after the other, a piece of one at a time."""
        state, parts = self._states[row.id], list(self.parts.values())
        while state.num_prepared < len(parts):
            if not parts[state.num_prepared].prepare(_seen_by_parts(row), max_tokens):
                return False
            state.num_prepared += 1
        return True

    def finish(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states.pop(row.id, None)
        for part in self.parts.values():
            part.finish(rows)

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        seen = [_seen_by_parts(row) for row in rows]
        for row in rows:
            self._learn(row)
        proposals: list[list[Proposal]] = [[] for _ in rows]
        # no longer path fits the budget; and what a part writes to the target's cache is overwritten
        limits = [min(limit, self.num_draft_tokens) for limit in limits]
        for p, (name, part) in enumerate(self.parts.items()):
            with blaming(name, "part"):
                proposed = part.propose(seen, limits)
                drafts = read_drafts(proposed, seen, limits, read_length(part))
            for draft, row, of_row in zip(drafts, rows, proposals, strict=True):
                record = self._states[row.id].records[p]
                record.tokens = draft.tokens
                record.parents = draft.parents or list(range(-1, len(draft.tokens) - 1))
                of_row.append(Proposal(record.tokens, record.parents, record.acceptance))
        trees = [merge(of_row, self.num_draft_tokens) for of_row in proposals]
        cpu = torch.device("cpu")
        parents, _ = pad_drafts([parents for _, parents in trees], cpu)
        return Drafts(*pad_drafts([tokens for tokens, _ in trees], cpu), parents=parents)

    def _learn(self, row: RowView) -> None:
        state = self._states[row.id]
        written = row.tokens[state.num_tokens :]
        for record in state.records:
            record.learn(written)
        state.num_tokens = len(row.tokens)

    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> Foresight:
        if self.needs.target_weights:
            if self._target is None:
                raise ValueError(f"'{self.name}' was built without the target its parts draft with")
            return CachedForesight(self, self._target, prompt, trajectory, sampling=sampling)
        return SimulatedForesight(self, prompt, trajectory, sampling=sampling)

    @contextmanager
    def at_full_length(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.at_full_length())
            yield

    def identity(self) -> dict[str, object]:
        parts = identity_of_arms({name: part.identity() for name, part in self.parts.items()})
        return {**super().identity(), "parts": parts}

    def num_bytes(self) -> int:
        """Nothing of its own: its parts are arms and are counted there."""
        return 0

    def bound_cache(self, max_positions: int | None, exact_fit: bool) -> None:
        for part in self.parts.values():
            part.bound_cache(max_positions, exact_fit)

    def state_bytes(self, lengths: Sequence[int]) -> int:
        return sum(part.state_bytes(lengths) for part in self.parts.values())

    def holders(self) -> Sequence[Drafter]:
        return [holder for part in self.parts.values() for holder in part.holders()]


def _part(name: str, part: str, drafters: Mapping[str, Drafter]) -> Drafter:
    found = drafters.get(part)
    if found is None or part == NONE:
        there = ", ".join(other for other in drafters if other != NONE) or "none"
        raise ConfigError(
            f"drafter '{name}': its part '{part}' is not a drafter configured before it; there "
            f"are: {there}"
        )
    if isinstance(found, Union):
        raise ConfigError(
            f"drafter '{name}': its part '{part}' is a union; name that one's parts instead: "
            f"{', '.join(found.parts)}"
        )
    if found.wants_prices:
        raise ConfigError(
            f"drafter '{name}': its part '{part}' drafts by prices, and a union's replay must not "
            "depend on them; set another 'stop' for the part"
        )
    return found
