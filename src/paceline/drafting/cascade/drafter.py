"""A drafter of parts: each round, each row gets the draft with the most expected tokens per second.

Lookups are asked first, since they cost almost nothing. A model is asked where it promises more than
the best lookup's draft and more than no draft; how much it promises follows from replay, from how sure
the lookups are, and from what it has shown in this request (`kernels`). A model that is not asked reads
nothing; it catches up when it is asked again. Parts draft greedily, under `invariant` sampling with the
judge's noise. Symbols: R rows, L lookups, M models, W the longest chain of a model, K the longest draft
of any part.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paceline.contracts import GREEDY, Drafts, identity_of_arms
from paceline.drafting.base import Drafter, Needs
from paceline.drafting.cascade.calibration import Chances
from paceline.drafting.cascade.chains import Chain, Wish, draft_chains, ends_by_itself
from paceline.drafting.cascade.fields import BRANCHES, DRAFTED, LENGTH, PART
from paceline.drafting.cascade.prices import Prices, assumed_prices, read_prices
from paceline.drafting.cascade.settings import CascadeSettings, find_parts
from paceline.drafting.draft_replay import CachedReplay, row_for_parts
from paceline.drafting.suffix_lookup import SuffixLookup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.costs.table import CostTable
    from paceline.drafting.base import BuildContext
    from paceline.drafting.cascade.entry import CascadeTable, RowState
    from paceline.drafting.draft_replay import DraftReplay
    from paceline.models.language_model import LanguageModel


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
        from paceline.drafting.cascade import entry

        super().__init__(name, num_draft_tokens)
        self._entry = entry
        self._target = target
        lookups = {n: part for n, part in parts.items() if isinstance(part, SuffixLookup)}
        self.lookups: dict[str, SuffixLookup] = lookups
        self.models = {n: part for n, part in parts.items() if n not in lookups}
        self.parts: dict[str, Drafter] = {**self.lookups, **self.models}
        self._lookups, self._models = list(self.lookups.values()), list(self.models.values())
        needs = [part.needs for part in self.parts.values()]
        self.needs = Needs(  # type: ignore[misc] # the parts of an instance decide
            same_vocabulary=any(n.same_vocabulary for n in needs),
            target_weights=any(n.target_weights for n in needs),
        )
        self._costs: CostTable | None = None
        self._prices: dict[int, Prices] = {}  # by rows in flight
        self._tables: dict[tuple[int, bool], CascadeTable] = {}
        self._states: dict[int, RowState] = {}
        longest = (lookup.num_draft_tokens for lookup in self.lookups.values())
        # fixed here, since machine code writes to arrays of these sizes
        self._longest_chain = num_draft_tokens  # W
        self._width = max(num_draft_tokens, *longest)  # K
        self.calibrate(Chances.assumed(len(self.lookups), len(self.models)))

    @classmethod
    def build(cls, name: str, settings: CascadeSettings, context: BuildContext) -> Cascade:
        parts = find_parts(name, settings, context.drafters)
        return cls(name, parts, settings.num_draft_tokens, context.target)

    # --- prices and chances -----------------------------------------------------------------------

    def price(self, costs: CostTable) -> None:
        self._costs = costs
        self._prices.clear()
        self._tables.clear()

    def calibrate(self, chances: Chances) -> None:
        """Take chances that were learned from replay, lookups and models in the order of `parts`."""
        self.chances = chances
        self._tables.clear()
        self._if_sure = [tuple(table) for table in chances.if_sure.tolist()]

    def _prices_at(self, rows: int) -> Prices:
        prices = self._prices.get(rows)
        if prices is None:
            names = tuple(self.models)
            if self._costs is None:
                prices = assumed_prices(len(names), self._longest_chain)
            else:
                prices = read_prices(self._costs, self.name, names, self._longest_chain, rows)
            self._prices[rows] = prices
        return prices

    def _table(self, rows: int) -> CascadeTable:
        """Return chances and prices with a number of rows in flight, for machine code."""
        key = rows, self.stops_early
        table = self._tables.get(key)
        if table is None:
            sizes = len(self.lookups), len(self.models), self._longest_chain, self._width
            prices = self._prices_at(rows)
            table = self._entry.CascadeTable(sizes, self.chances, prices, self.stops_early)
            self._tables[key] = table
        return table

    # --- rows -------------------------------------------------------------------------------------

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states[row.id] = self._entry.RowState(
                len(self.lookups), len(self.models), self._width, self._longest_chain,
                num_read=len(row.tokens) - 1,
            )  # fmt: skip
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

    # --- drafting ---------------------------------------------------------------------------------

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        table = self._table(max(self.rows_in_flight, len(rows)))
        states = [self._states[row.id] for row in rows]
        sizes, proposed, is_tree, L = [0] * len(rows), [0] * len(rows), False, len(self.lookups)
        wishes: list[Wish] = []
        for i, (row, state, limit) in enumerate(zip(rows, states, limits, strict=True)):
            part = self._choose(table, row, state, limit)
            length, branches = state.fields[LENGTH : BRANCHES + 1].tolist()
            if part < L:
                sizes[i] = length
                is_tree |= branches > 0
                continue
            if ends_by_itself(self._models[part - L], row):
                length = min(limit, self._longest_chain, state.rooms.item(part - L))
            wishes.append(Wish(i, part - L, row_for_parts(row), length, state.least))
        for model in {wish.model for wish in wishes}:
            own = [wish for wish in wishes if wish.model == model]
            for chain in draft_chains(self._models[model], own, self._if_sure[model]):
                i = chain.place
                sizes[i] = self._cut(table, rows[i], states[i], chain)
                proposed[i] = len(chain.tokens)
        longest = max(sizes)
        # [2, R, K] tokens and parents
        nodes = (
            states[0].nodes[:, None] if len(rows) == 1 else np.stack([s.nodes for s in states], 1)
        )
        drafts = Drafts(nodes[0, :, :longest], sizes, proposed=proposed)
        if self.rows_in_flight > 1 or len(rows) > 1:  # for the budget that rows share
            drafts.chances = np.stack(
                [state.chances[max(0, state.fields.item(PART)), :longest] for state in states]
            )
        if is_tree:
            drafts.parents = nodes[1, :, :longest]
        return drafts

    def _choose(self, table: CascadeTable, row: RowView, state: RowState, limit: int) -> int:
        """Ask the lookups, then return the part that drafts for a row, -1 for none."""
        num_tokens, at, room = len(row.tokens), state.drafts_at, self._width
        most = self.num_draft_tokens  # it may have been lowered
        for i, lookup in enumerate(self._lookups):
            state.lengths[i] = min(lookup.grow_tree(row, limit, at, room)[0], most)
            at += state.draft_bytes
        for i, model in enumerate(self._models):
            state.rooms[i] = min(model.longest_draft(row), most)
        return self._entry.choose_row(
            table.address, state.whole_at, state.other_at, state.drafts_at,
            self._lookups[0].index_address(row), num_tokens, limit,
        )  # fmt: skip

    def _cut(self, table: CascadeTable, row: RowView, state: RowState, chain: Chain) -> int:
        """Write a model's chain into a row's state, up to where it pays; return that length."""
        length = len(chain.tokens)
        state.nodes[0, :length] = chain.tokens
        if chain.sure is None or not self.stops_early:
            state.fields[[LENGTH, DRAFTED]] = length
            if not length:
                state.fields[PART] = -1
            return length
        state.sure[:length] = chain.sure
        return self._entry.cut_row(
            table.address, state.whole_at, state.other_at, len(row.tokens), length
        )

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
