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
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section
from paceline.contracts import GREEDY, NONE, Drafts, identity_of_arms
from paceline.drafting.base import Drafter, Needs
from paceline.drafting.cascade.calibration import Chances
from paceline.drafting.cascade.prices import Prices, assumed_prices, read_prices
from paceline.drafting.contract import blaming, read_drafts, read_length
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.draft_replay import CachedReplay, SimpleRow
from paceline.drafting.suffix_lookup import SuffixLookup
from paceline.errors import ConfigError
from paceline.models.packing import ChainEnds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.costs.table import CostTable
    from paceline.drafting.base import BuildContext
    from paceline.drafting.draft_replay import DraftReplay
    from paceline.models.language_model import LanguageModel


class CascadeSettings(Section):
    """Settings. parts: drafters configured before, at least one of them a `suffix_lookup`.
    num_draft_tokens: maximum tokens of a draft.
    """

    parts: tuple[str, ...] = Field(min_length=1)
    num_draft_tokens: int = Field(default=16, ge=1, le=MAX_DRAFT_TOKENS)

    @model_validator(mode="after")
    def _parts_differ(self) -> CascadeSettings:
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"a part is named twice: {', '.join(self.parts)}")
        return self


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


class _Wish(NamedTuple):
    """A row that a model is asked for: its place, the longest chain, and the prices of lengths."""

    row: int
    longest: int
    least: float  # hope
    verifying: np.ndarray  # [W + 1]
    drafting: np.ndarray  # [W + 1]


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
        parts = {part: _part(name, part, context.drafters) for part in settings.parts}
        if not any(isinstance(part, SuffixLookup) for part in parts.values()):
            raise ConfigError(
                f"drafter '{name}': none of its parts {', '.join(parts)} is a suffix_lookup; name one "
                "first, or use the parts alone"
            )
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
        chances = np.zeros((len(rows), width))
        sizes, is_tree = [0] * len(rows), False
        asked: dict[int, list[_Wish]] = {}  # by model
        rooms = np.zeros(len(self.models), dtype=np.int64)
        of_parts = np.zeros((len(self.parts), width))
        models = list(self.models.values())
        L = len(self.lookups)
        for i, row in enumerate(rows):
            state = self._states[row.id]
            num_tokens = len(row.tokens)
            self._learn(state, row, num_tokens)
            verifying, drafting = prices.at(num_tokens - 1)
            if models:
                rooms[:] = [model.longest_draft(row) for model in models]
                unread = [num_tokens - 1 - read for read in state.read]
                drafting = drafting + (prices.reading * unread)[:, None]
            part, length, bin_here, branches, least = kernels.choose(
                found[2, :, i], found[1, :, i], lengths[:, i], limits[i], self.chances.tables,
                self.chances.prospects, state.seen, verifying, drafting, rooms, of_parts,
            )  # fmt: skip
            if not self.stops_early and models:
                part, least = L, 0.0
                length = min(limits[i], self.num_draft_tokens, int(rooms[0]))
            state.part, state.num_tokens = part if length else -1, num_tokens
            if not length:
                continue
            chances[i, :length] = of_parts[part, :length]
            if part < L:
                out[:, i, :length] = found[:2, part, i, :length]
                sizes[i] = length
                is_tree |= branches
                table = self.chances.tables[part]
                state.nodes = out[:, i, :length]
                state.base = table[found[2, part, i, :length]]
                continue
            model = part - L
            state.base = self.chances.prospects[model, bin_here]  # of the first token and of others
            state.read[model] = num_tokens - 1
            longest = length
            if self._is_sure(models[model], row):
                longest = min(limits[i], self.num_draft_tokens, int(rooms[model]))
            wish = _Wish(i, longest, least, verifying, drafting[model])
            asked.setdefault(model, []).append(wish)
        proposed = [0] * len(rows)
        for model, wishes in asked.items():
            self._ask(models[model], model, wishes, rows, out, chances, sizes, proposed)
        longest = max(sizes)
        drafts = Drafts(
            torch.from_numpy(out[0, :, :longest]),
            sizes,
            chances=chances[:, :longest],
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

    def _is_sure(self, model: Drafter, row: RowView) -> bool:
        """Return whether the model's own probabilities end its chain for the row."""
        is_greedy = row.sampling.method != "invariant"
        return is_greedy and isinstance(model, DraftModel) and model.stop.stop == "fixed"

    def _ask(
        self,
        part: Drafter,
        model: int,
        wishes: Sequence[_Wish],
        rows: Sequence[RowView],
        out: np.ndarray,
        chances: np.ndarray,
        sizes: list[int],
        proposed: list[int],
    ) -> None:
        """Write a model's chains for some rows: tokens and parents [2, R, W], chances [R, W], sizes."""
        sure_of: dict[bool, list[_Wish]] = {True: [], False: []}
        for wish in wishes:
            sure_of[self._is_sure(part, rows[wish.row])].append(wish)
        chains: list[tuple[_Wish, list[int]]] = []
        if plain := sure_of[False]:
            own, limits = [_for_parts(rows[w.row]) for w in plain], [w.longest for w in plain]
            with blaming(part.name, "part"):
                drafts = read_drafts(part.propose(own, limits), own, limits, read_length(part))
            chains += [(wish, draft.tokens) for wish, draft in zip(plain, drafts, strict=True)]
            for wish, draft in zip(plain, drafts, strict=True):
                proposed[wish.row] = len(draft.tokens)
        if sure_of[True]:
            chains += self._ask_sure(part, model, sure_of[True], rows, chances, proposed)
        for wish, tokens in chains:
            state, size = self._states[rows[wish.row].id], len(tokens)
            sizes[wish.row] = size
            out[0, wish.row, :size] = tokens
            out[1, wish.row, :size] = np.arange(-1, size - 1)
            assert state.base is not None
            state.nodes = out[:, wish.row, :size]
            state.base = state.base[np.minimum(np.arange(size), 1)]
            if not size:
                state.part = -1

    def _ask_sure(
        self,
        part: Any,
        model: int,
        wishes: Sequence[_Wish],
        rows: Sequence[RowView],
        chances: np.ndarray,
        proposed: list[int],
    ) -> list[tuple[_Wish, list[int]]]:
        """Return the chains of a model that ends them by its own probabilities, cut where it pays."""
        table = self.chances.if_sure[model]
        ends = ChainEnds(self._if_sure[model], [wish.least for wish in wishes])
        own, limits = [_for_parts(rows[w.row]) for w in wishes], [w.longest for w in wishes]
        with blaming(part.name, "part"):
            drafted, sure = part.draft_while_sure(own, limits, ends)
        chains = []
        for wish, tokens, probabilities in zip(wishes, drafted, sure, strict=True):
            size = proposed[wish.row] = len(tokens)
            if self.stops_early:
                size = self._kernels.cut_chain(
                    np.array(probabilities), table, wish.verifying, wish.drafting[size],
                    chances[wish.row],
                )  # fmt: skip
            chains.append((wish, tokens[:size]))
        return chains

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


def _part(name: str, part: str, drafters: Mapping[str, Drafter]) -> Drafter:
    """Return a configured part. Raises ConfigError if it is missing or does not fit in a cascade."""
    drafter = drafters.get(part)
    if drafter is None or part == NONE:
        known = ", ".join(other for other in drafters if other != NONE) or "none"
        raise ConfigError(
            f"drafter '{name}': its part '{part}' is not a drafter configured before it; there "
            f"are: {known}"
        )
    if drafter.wants_prices or not (isinstance(drafter, SuffixLookup) or drafter.nests):
        raise ConfigError(
            f"drafter '{name}': its part '{part}' ({drafter.kind}) cannot be a part; parts are "
            "suffix_lookup and drafters of chains whose length does not depend on prices"
        )
    return drafter
