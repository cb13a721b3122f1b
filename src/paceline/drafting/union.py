"""The proposals of several drafters in one tree, of which a round accepts the best path.

After SpecInfer's merged trees (arXiv 2305.09781), with a budget of nodes filled by expected acceptance
as in OPT-Tree (arXiv 2406.17276), here estimated from each part's acceptance in the request so far. A
tree is judged by the target's own draws and has no probabilities, so under sampling the parts draft
greedily; under `invariant` they draw with the judge's noise. `drafting.draft_length` has the rules of a
draft's length, in order. Symbols: a = a part's acceptance, the probability that its next token is right.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section
from paceline.contracts import GREEDY, NONE, Drafts, identity_of_arms
from paceline.drafting.base import Drafter, Needs, pad_drafts
from paceline.drafting.contract import blaming, read_drafts, read_length, tree_depth
from paceline.drafting.draft_replay import CachedReplay, count_accepted, row_for_parts
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.drafting.base import BuildContext
    from paceline.drafting.draft_replay import DraftReplay
    from paceline.models.language_model import LanguageModel

# a part's acceptance before its first proposal, and the number of tokens that this prior counts as
_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0


class UnionSettings(Section):
    """Settings. parts: drafters configured before. num_draft_tokens: maximum nodes of the tree."""

    parts: tuple[str, ...] = Field(min_length=2)
    num_draft_tokens: int = Field(default=16, ge=1, le=MAX_DRAFT_TOKENS)

    @model_validator(mode="after")
    def _parts_differ(self) -> UnionSettings:
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"a part is named twice: {', '.join(self.parts)}")
        return self


@dataclass(frozen=True, slots=True)
class Proposal:
    """One part's draft for a row, and its acceptance. `parents` as in `Drafts`, also for a chain."""

    tokens: list[int]
    parents: list[int]
    acceptance: float


def merge(proposals: Sequence[Proposal], num_nodes: int) -> tuple[list[int], list[int]]:
    """Return (tokens, parents) of one tree: the nodes most likely to be accepted, equal ones joined.

    A part's k-th child of a node has a/k of the node's probability; a node of several parts is wrong
    only if all of them are wrong. Probabilities never rise towards the leaves, so the best nodes are a
    tree.
    """
    tokens: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    wrong: list[float] = []  # the probability that a node is wrong
    for proposal in proposals:
        merged: list[int] = []  # the proposal's nodes in the merged tree
        right: list[float] = []  # the probability of each, by this part alone
        num_children: dict[int, int] = {}
        for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
            rank = num_children[parent] = num_children.get(parent, 0) + 1
            above = right[parent] if parent >= 0 else 1.0
            right.append(above * proposal.acceptance / rank)
            merged_parent = merged[parent] if parent >= 0 else -1
            node = children.setdefault((merged_parent, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(merged_parent)
                wrong.append(1.0)
            if node not in merged:  # a repeated node is not more likely
                wrong[node] *= 1.0 - right[-1]
            merged.append(node)
    # a stable sort keeps a parent before its child where they are equally likely
    nodes = sorted(sorted(range(len(tokens)), key=lambda node: wrong[node])[:num_nodes])
    number = {node: k for k, node in enumerate(nodes)} | {-1: -1}
    return [tokens[node] for node in nodes], [number[parents[node]] for node in nodes]


@dataclass(slots=True)
class _Record:
    """One part's right and wrong tokens in one row, and its last proposal."""

    right: float = 0.0
    wrong: float = 0.0
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        tried = self.right + self.wrong
        return (self.right + _PRIOR * _PRIOR_WEIGHT) / (tried + _PRIOR_WEIGHT)

    def learn(self, written: Sequence[int]) -> None:
        """Score the last proposal by the tokens that the target wrote instead."""
        accepted = count_accepted(self.tokens, self.parents, written)
        self.right += accepted
        # a draft that matches up to its end, or up to the text's, has no wrong token
        self.wrong += accepted < min(len(written), tree_depth(self.parents))
        self.tokens, self.parents = [], []


@dataclass(slots=True)
class _State:
    """The parts' records in one row, and the progress of their prefill."""

    records: list[_Record]  # of the parts
    num_tokens: int = 0  # of the row at the last proposal
    num_prepared: int = 0  # parts whose prefill is complete


class Union(Drafter):
    """Several drafters' proposals, merged into one tree.

    The parts are arms themselves. A row has one arm at a time, so their states never collide.
    """

    kind = "union"
    replays_everywhere = False  # earlier rounds weigh the parts
    Settings = UnionSettings

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
        self.needs = Needs(  # type: ignore[misc] # the parts of an instance decide
            same_vocabulary=any(n.same_vocabulary for n in needs),
            target_weights=any(n.target_weights for n in needs),
        )
        self._states: dict[int, _State] = {}

    @classmethod
    def build(cls, name: str, settings: UnionSettings, context: BuildContext) -> Union:
        parts = {part: _part(name, part, context.drafters) for part in settings.parts}
        return cls(name, parts, settings.num_draft_tokens, context.target)

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states[row.id] = _State([_Record() for _ in self.parts], len(row.tokens))
        seen = [row_for_parts(row) for row in rows]
        for part in self.parts.values():
            part.start(seen)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        """Prepare one part after the other, one piece per call."""
        state, parts = self._states[row.id], list(self.parts.values())
        while state.num_prepared < len(parts):
            if not parts[state.num_prepared].prepare(row_for_parts(row), max_tokens):
                return False
            state.num_prepared += 1
        return True

    def finish(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states.pop(row.id, None)
        for part in self.parts.values():
            part.finish(rows)

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        seen = [row_for_parts(row) for row in rows]
        for row in rows:
            self._learn(row)
        proposals: list[list[Proposal]] = [[] for _ in rows]
        # a longer path does not fit the budget, and its entries in the target's cache would stay
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
    ) -> DraftReplay:
        if self.needs.target_weights:
            if self._target is None:
                raise ValueError(f"'{self.name}' was built without the target its parts draft with")
            return CachedReplay(self, self._target, prompt, trajectory, sampling=sampling)
        return super().would_accept(prompt, trajectory, p, sampling)

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
        """Return 0: the parts are arms and are counted as such."""
        return 0

    def bound_cache(self, max_positions: int | None, exact_fit: bool) -> None:
        for part in self.parts.values():
            part.bound_cache(max_positions, exact_fit)

    def state_bytes(self, lengths: Sequence[int]) -> int:
        return sum(part.state_bytes(lengths) for part in self.parts.values())

    def holders(self) -> Sequence[Drafter]:
        return [holder for part in self.parts.values() for holder in part.holders()]


def _part(name: str, part: str, drafters: Mapping[str, Drafter]) -> Drafter:
    """Return a configured part. Raises ConfigError if it is missing or does not fit in a union."""
    drafter = drafters.get(part)
    if drafter is None or part == NONE:
        known = ", ".join(other for other in drafters if other != NONE) or "none"
        raise ConfigError(
            f"drafter '{name}': its part '{part}' is not a drafter configured before it; there "
            f"are: {known}"
        )
    if isinstance(drafter, Union):
        raise ConfigError(
            f"drafter '{name}': its part '{part}' is a union; name that one's parts instead: "
            f"{', '.join(drafter.parts)}"
        )
    if drafter.wants_prices or drafter.takes_prices:
        raise ConfigError(
            f"drafter '{name}': its part '{part}' drafts by prices, and a union's replay must not "
            "depend on them; set another 'stop' for the part, or name a cascade's parts"
        )
    return drafter
