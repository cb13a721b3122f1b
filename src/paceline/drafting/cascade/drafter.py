"""A drafter of parts: each round, each row gets the draft with the most expected tokens per second.

Lookups are asked first, since they cost almost nothing. A model is asked where it promises more than
the best lookup's draft and more than no draft; how much it promises follows from replay, from how sure
the lookups are, and from what it has shown in this request (`kernels`). A model that is not asked reads
nothing; it catches up when it is asked again. Parts draft greedily, under `invariant` sampling with the
judge's noise. Symbols: R rows, L lookups, M models, K the longest draft of a lookup, W that of the
cascade.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from paceline.contracts import GREEDY, Drafts, identity_of_arms
from paceline.drafting.base import Drafter, Needs
from paceline.drafting.cascade.calibration import Chances
from paceline.drafting.cascade.chains import Chain, Wish, draft_chains, ends_by_itself
from paceline.drafting.cascade.prices import Prices, assumed_prices, read_prices
from paceline.drafting.cascade.settings import CascadeSettings, find_parts
from paceline.drafting.contract import blaming
from paceline.drafting.draft_replay import CachedReplay, SimpleRow
from paceline.drafting.suffix_lookup import SuffixLookup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.costs.table import CostTable
    from paceline.drafting.base import BuildContext
    from paceline.drafting.draft_replay import DraftReplay
    from paceline.models.language_model import LanguageModel


@dataclass(slots=True)
class _State:
    """What the parts have shown in one row, and the draft of its last round."""

    seen: np.ndarray  # [L + M, 2]
    read: list[int]  # [M] tokens that each model has read
    num_prepared: int = 0  # parts whose prefill is complete
    num_tokens: int = 0  # of the row at the last draft
    part: int = -1  # that drafted it
    nodes: np.ndarray | None = None  # [2, n] its tokens and parents
    base: np.ndarray | None = None  # [n] chances by class


class Cascade(Drafter):
    """Lookups first, then models. The parts are arms themselves."""

    kind = "cascade"
    replays_everywhere = False  # earlier rounds decide which part drafts
    Settings: ClassVar[type[CascadeSettings]] = CascadeSettings
    composed = True
    takes_prices = True

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Drafter],
        num_draft_tokens: int = 16,
        target: LanguageModel | None = None,
    ) -> None:
        """target: for the replay of parts that draft with its weights."""
        # imported here because numba takes a second to import
        from paceline.drafting.cascade import kernels

        super().__init__(name, num_draft_tokens)
        self._kernels = kernels
        self._target = target
        lookups = {n: part for n, part in parts.items() if isinstance(part, SuffixLookup)}
        self.lookups: dict[str, SuffixLookup] = lookups
        self.models = {n: part for n, part in parts.items() if n not in lookups}
        self.parts: dict[str, Drafter] = {**self.lookups, **self.models}
        needs = [part.needs for part in self.parts.values()]
        self.needs = Needs(  # type: ignore[misc] # the parts of an instance decide
            same_vocabulary=any(n.same_vocabulary for n in needs),
            target_weights=any(n.target_weights for n in needs),
        )
        self.calibrate(Chances.assumed(len(self.lookups), len(self.models)))
        self._costs: CostTable | None = None
        self._prices: dict[int, Prices] = {}  # by rows in flight
        self._states: dict[int, _State] = {}
        self._width = max(lookup.num_draft_tokens for lookup in self.lookups.values())  # K

    @classmethod
    def build(cls, name: str, settings: CascadeSettings, context: BuildContext) -> Cascade:
        parts = find_parts(name, settings, context.drafters)
        return cls(name, parts, settings.num_draft_tokens, context.target)

    # --- prices and chances -----------------------------------------------------------------------

    def price(self, costs: CostTable) -> None:
        self._costs = costs
        self._prices.clear()

    def calibrate(self, chances: Chances) -> None:
        """Take chances that were learned from replay, lookups and models in the order of `parts`."""
        self.chances = chances
        self._if_sure = [tuple(table) for table in chances.if_sure.tolist()]

    def _prices_at(self, rows: int) -> Prices:
        prices = self._prices.get(rows)
        if prices is None:
            names = tuple(self.models)
            if self._costs is None:
                prices = assumed_prices(len(names), self.num_draft_tokens)
            else:
                prices = read_prices(self._costs, self.name, names, self.num_draft_tokens, rows)
            self._prices[rows] = prices
        return prices

    # --- rows -------------------------------------------------------------------------------------

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states[row.id] = _State(
                np.zeros((len(self.parts), 2)), [len(row.tokens) - 1] * len(self.models)
            )
        seen = [_for_parts(row) for row in rows]
        for part in self.parts.values():
            part.start(seen)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        """Prepare one part after the other, one piece per call."""
        state, parts = self._states[row.id], list(self.parts.values())
        while state.num_prepared < len(parts):
            if not parts[state.num_prepared].prepare(_for_parts(row), max_tokens):
                return False
            state.num_prepared += 1
        return True

    def finish(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states.pop(row.id, None)
        for part in self.parts.values():
            part.finish(rows)

    # --- drafting ---------------------------------------------------------------------------------

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        kernels = self._kernels
        found, lengths = self._look_up(rows, limits)  # [3, L, R, K], [L, R]
        prices = self._prices_at(max(self.rows_in_flight, len(rows)))
        width = max(self._width, self.num_draft_tokens)
        out = np.full((2, len(rows), width), -1, dtype=np.int64)  # tokens, parents
        chances = np.zeros((len(rows), len(self.parts), width))
        sizes, proposed, is_tree = [0] * len(rows), [0] * len(rows), False
        wishes: list[list[Wish]] = [[] for _ in self.models]
        rooms = np.zeros(len(self.models), dtype=np.int64)
        models = list(self.models.values())
        L = len(self.lookups)
        for i, row in enumerate(rows):
            state, num_tokens = self._states[row.id], len(row.tokens)
            self._learn(state, row, num_tokens)
            verifying, drafting = prices.at(num_tokens - 1)
            if models:
                rooms[:] = [model.longest_draft(row) for model in models]
                unread = [num_tokens - 1 - read for read in state.read]
                drafting = drafting + (prices.reading * unread)[:, None]
            part, length, bin_here, branches, least = kernels.choose(
                found[2, :, i], found[1, :, i], lengths[:, i], limits[i], self.chances.tables,
                self.chances.prospects, state.seen, verifying, drafting, rooms, chances[i],
            )  # fmt: skip
            if not self.stops_early and models:
                part, least = L, 0.0
                length = min(limits[i], self.num_draft_tokens, int(rooms[0]))
            state.part, state.num_tokens = part if length else -1, num_tokens
            chances[i, 0] = chances[i, part]
            if not length:
                continue
            if part < L:
                out[:, i, :length] = found[:2, part, i, :length]
                sizes[i] = length
                is_tree |= branches
                state.nodes = out[:, i, :length]
                state.base = self.chances.tables[part][found[2, part, i, :length]]
                continue
            model = part - L
            state.base = self.chances.prospects[model, bin_here]  # of the first token and of others
            state.read[model] = num_tokens - 1
            if ends_by_itself(models[model], row):
                length = min(limits[i], self.num_draft_tokens, int(rooms[model]))
            wishes[model].append(
                Wish(i, _for_parts(row), length, least, verifying, drafting[model], chances[i, 0])
            )
        for model, own in enumerate(wishes):
            for chain in self._draft_chains(models[model], model, own):
                sizes[chain.place], proposed[chain.place] = len(chain.tokens), chain.num_drafted
                self._keep(rows[chain.place], chain, out[:, chain.place])
        longest = max(sizes)
        drafts = Drafts(
            torch.from_numpy(out[0, :, :longest]),
            sizes,
            chances=chances[:, 0, :longest],
            proposed=proposed,
        )
        if is_tree:
            drafts.parents = torch.from_numpy(out[1, :, :longest])
        return drafts

    def _look_up(
        self, rows: Sequence[RowView], limits: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the lookups' tokens, parents and evidence [3, L, R, K], and lengths [L, R]."""
        found = np.zeros((3, len(self.lookups), len(rows), self._width), dtype=np.int64)
        lengths = np.zeros((len(self.lookups), len(rows)), dtype=np.int64)
        for place, (name, lookup) in enumerate(self.lookups.items()):
            with blaming(name, "part"):
                arrays, trees = lookup.grow_trees(rows, limits)
            found[:, place, :, : arrays.shape[2]] = arrays
            lengths[place] = [tree.num_tokens for tree in trees]
        return found, lengths

    def _draft_chains(self, part: Drafter, model: int, wishes: Sequence[Wish]) -> list[Chain]:
        if not wishes:
            return []
        cut = self._kernels.cut_chain if self.stops_early else None
        return draft_chains(part, wishes, self._if_sure[model], cut)

    def _keep(self, row: RowView, chain: Chain, out: np.ndarray) -> None:
        """Write a model's chain into tokens and parents [2, W], and keep it for `_learn`."""
        state, size = self._states[row.id], len(chain.tokens)
        out[0, :size], out[1, :size] = chain.tokens, np.arange(-1, size - 1)
        assert state.base is not None
        state.nodes, state.base = out[:, :size], state.base[np.minimum(np.arange(size), 1)]
        if not size:
            state.part = -1

    def _learn(self, state: _State, row: RowView, num_tokens: int) -> None:
        """Count the last draft's tokens by what was written instead."""
        if state.part < 0 or state.nodes is None or state.base is None:
            return
        size = state.nodes.shape[1]
        written = np.array(
            row.tokens[state.num_tokens : min(num_tokens, state.num_tokens + size + 1)],
            dtype=np.int64,
        )
        self._kernels.learn(
            state.nodes[0], state.nodes[1], state.base, size, written, state.seen[state.part]
        )
        state.part = -1

    # --- replay, identity, memory -----------------------------------------------------------------

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
            stack.enter_context(super().at_full_length())
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


def _for_parts(row: RowView) -> RowView:
    """Return the row as its parts see it: greedy, unless sampled by `invariant`."""
    if row.sampling.method in ("greedy", "invariant"):
        return row
    return SimpleRow(row.tokens, row.num_prompt, row.slot, row.id, num_cached=row.num_cached)
