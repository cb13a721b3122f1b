"""A small language model that drafts a chain, token by token.

It shares the target's vocabulary. Greedy rows get its most likely tokens; sampled rows get draws from
its warped distribution q, with the judge's own noise under `invariant` sampling. Published as
speculative decoding (arXiv 2211.17192). `drafting.draft_length` has the rules of a draft's length, in
order. Symbols: R rows, K draft length, V the target's logits width, V' the drafter's width, at most V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.config import ModelSection
from paceline.contracts import GREEDY, Drafts
from paceline.drafting.base import Drafter, Needs, pad_drafts
from paceline.drafting.cached_rows import CachedRows
from paceline.drafting.chain_replay import NO_SCORES, ChainReplay, score_positions
from paceline.drafting.draft_length import (
    FIXED_LENGTH,
    ExpectedGainStop,
    StopSettings,
    confidences,
    make_rule,
)
from paceline.drafting.draft_replay import SimulatedReplay
from paceline.drafting.drawing import draw, draws_of, empty_probs, is_chain_drawn
from paceline.drafting.sure_chains import step_while_sure
from paceline.models.cache import BLOCK
from paceline.models.loading import load_language_model, load_tokenizer
from paceline.models.packing import Draw, Span
from paceline.models.vocabulary import Vocabulary, check_same_vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.costs.table import CostTable
    from paceline.drafting.base import BuildContext
    from paceline.drafting.cached_rows import CachedRow
    from paceline.drafting.draft_replay import DraftReplay
    from paceline.models.language_model import LanguageModel
    from paceline.models.packing import ChainEnds
    from paceline.store.trained_on import TrainedOn


class DraftModelSettings(ModelSection, StopSettings):
    """A model, the maximum number of tokens it drafts per round, and its stop rule."""


class DraftModel(Drafter):
    kind = "draft_model"
    nests = True
    Settings = DraftModelSettings
    needs = Needs(same_vocabulary=True)
    shares_ids = True  # a drafted token has the same id in the model

    def __init__(
        self,
        name: str,
        model: LanguageModel,
        num_draft_tokens: int,
        num_tokens: int,
        num_logits: int,
        prefill_chunk: int = 512,
        stop: StopSettings | None = None,
    ) -> None:
        """num_tokens: ids that exist in the shared vocabulary; num_logits: the target's width V."""
        super().__init__(name, num_draft_tokens)
        self.model = model
        self.stop = stop or StopSettings()
        self._num_tokens = min(num_tokens, model.num_logits)
        self._num_logits = num_logits
        self._states = CachedRows(model, prefill_chunk)
        self._rule = make_rule(name, self.stop)

    @classmethod
    def check(cls, name: str, settings: DraftModelSettings, vocabulary: Vocabulary) -> None:
        check_same_vocabulary(name, vocabulary, Vocabulary.of(load_tokenizer(settings)))

    @classmethod
    def build(cls, name: str, settings: DraftModelSettings, context: BuildContext) -> DraftModel:
        model = load_language_model(settings, name)
        return cls.from_model(name, model, context, settings)

    @classmethod
    def from_model(
        cls,
        name: str,
        model: LanguageModel,
        context: BuildContext,
        stop: StopSettings | None = None,
    ) -> DraftModel:
        """Return the drafter of a loaded model."""
        stop = stop or StopSettings()
        return cls(
            name,
            model,
            num_draft_tokens=stop.num_draft_tokens,
            num_tokens=context.vocabulary.num_tokens,
            num_logits=context.target.num_logits,
            prefill_chunk=context.prefill_chunk,
            stop=stop,
        )

    def start(self, rows: Sequence[RowView]) -> None:
        if self.model.has_changed():
            # rows in flight keep caches of the old weights: worse drafts, never wrong text
            self.model.reload()
        self._states.start(rows)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        self._states.read_source(row)
        return self._states.prepare(row.id, self._text(row), max_tokens)

    def finish(self, rows: Sequence[RowView]) -> None:
        self._states.finish(rows)

    def keep(self, row: RowView, num_tokens: int) -> None:
        """Forget the cache of a row beyond its first tokens, where its text was rewritten."""
        self._states.keep(row.id, num_tokens)

    def identity(self) -> dict[str, object]:
        stop = self.stop.stop_identity()
        weights = {} if self.model.weights == "own" else {"weights": self.model.weights}
        return {**super().identity(), "model": self.model.fingerprint(), **weights, **stop}

    def trained_on(self) -> TrainedOn | None:
        return self.model.trained_on

    def num_bytes(self) -> int:
        return self.model.num_bytes() + self.model.packed_bytes + self.model.cache.num_bytes()

    def state_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes of the cache, in which every slot has the positions of the longest row."""
        longest = min(max(lengths, default=0), self.model.context_length)
        slots = max(len(lengths), self.model.cache.num_slots) if lengths else 0
        return slots * -(-longest // BLOCK) * BLOCK * self.model.position_bytes

    def bound_cache(self, max_positions: int | None, exact_fit: bool) -> None:
        self.model.cache.bound(max_positions, exact_fit)

    # --- prices -----------------------------------------------------------------------------------

    @property
    def wants_prices(self) -> bool:
        return self.stop.stop == "expected"

    def price(self, costs: CostTable) -> None:
        if self.wants_prices:
            self._rule = ExpectedGainStop(costs, self.name, self.num_draft_tokens)

    # --- the text in the model's own ids ----------------------------------------------------------

    def _text(self, row: RowView) -> Sequence[int]:
        """Return the row's text so far in the model's ids; it only grows."""
        return self.model.text_of(row.tokens, row.num_prompt)

    def _own_id(self, token: int) -> int:
        """Return the model's id of a token it drafted."""
        return token

    def _own_text(
        self, prompt: Sequence[int], output: Sequence[int]
    ) -> tuple[Sequence[int], np.ndarray]:
        """Return the model's ids of a text, and their number up to the output and each of its tokens."""
        own = self.model.text_of([*prompt, *output], len(prompt))
        return own, np.arange(len(own) - len(output), len(own) + 1)

    def _over_target(self, logits: Tensor) -> Tensor:
        """Return logits [R, V'] over the target's ids of the model's own."""
        return logits[:, : self._num_tokens]

    # --- drafting ---------------------------------------------------------------------------------

    def longest_draft(self, row: RowView) -> int:
        # each token that is fed needs a position in the cache
        room = self._states.max_positions + 1 - len(self._text(row))
        return max(0, min(self.num_draft_tokens, room))

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        rule = self._rule if self.stops_early else FIXED_LENGTH
        texts = [self._text(row) for row in rows]
        # each token that is fed needs a position in the cache
        room, most = self._states.max_positions + 1, self.num_draft_tokens
        longest = [
            max(0, min(limit, most, room - len(text)))
            for text, limit in zip(texts, limits, strict=True)
        ]
        slots = [self._states[row.id].slot for row in rows]
        # rows sorted by slot make one attention call
        active = sorted((i for i, n in enumerate(longest) if n), key=slots.__getitem__)
        fed = {i: self._states.catch_up(rows[i].id, texts[i]) for i in active}
        if rule is FIXED_LENGTH:
            chains = self._draft_chains(rows, texts, longest, fed)
            if chains is not None:
                return Drafts(*pad_drafts(chains, torch.device("cpu")))
        width = max(longest)
        probs = empty_probs(rows, width, self._num_logits, self.model.device)
        drafts: list[list[int]] = [[] for _ in rows]
        seen: dict[int, list[float]] = {i: [] for i in active}  # confidences
        for step in range(width):
            # between rounds the last token of a row is not cached
            active = [
                i
                for i in active
                if longest[i] > step
                and (not seen[i] or rule.allows_next(seen[i], len(rows[i].tokens) - 1))
            ]
            if not active:
                break
            logits = self._forward([self._states[rows[i].id] for i in active], fed, active)
            drawn = draw([rows[i] for i in active], logits, step, probs, active)
            for i, token in zip(active, drawn, strict=True):
                drafts[i].append(token)
                state = self._states[rows[i].id]
                if step == 0:
                    state.num_cached = len(texts[i])
                else:
                    state.drafted.extend(fed[i])
                fed[i] = [self._own_id(token)]
            if rule is not FIXED_LENGTH and step + 1 < width:
                for i, c in zip(active, confidences(logits).tolist(), strict=True):
                    seen[i].append(c)
        tokens, lengths = pad_drafts(drafts, torch.device("cpu"))
        return Drafts(tokens, lengths, None if probs is None else probs[:, : tokens.shape[1]])

    def draft_while_sure(
        self, rows: Sequence[RowView], limits: Sequence[int], ends: ChainEnds
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return greedy chains of rows, and their tokens' probabilities.

        A chain has at most its limit of tokens, and ends where `ends` says so or later, since rows are
        drafted together. limits: as `longest_draft` allows.
        """
        texts = [self._text(row) for row in rows]
        states = [self._states[row.id] for row in rows]
        fed = {
            i: self._states.catch_up(row.id, text)
            for i, (row, text) in enumerate(zip(rows, texts, strict=True))
        }
        # every row takes the steps of the longest chain, and each step needs a position
        room = self._states.max_positions + 1 - max(map(len, texts))
        steps = min(max(limits), room)
        if self.shares_ids and self.model.drafts_sure_chains:
            flat, spans = self._states.ready([row.id for row in rows], fed)
            chains, sure = self.model.draft_sure_chain(flat, spans, steps, self._num_tokens, ends)
            for state, text, chain in zip(states, texts, chains, strict=True):
                state.num_cached, state.drafted = len(text), chain[:-1]
        else:
            chains, sure = step_while_sure(
                lambda places: self._forward([states[i] for i in places], fed, list(places)),
                states, fed, list(map(len, texts)), self._own_id, steps, ends,
            )  # fmt: skip
        pairs = list(zip(limits, chains, sure, strict=True))
        return [c[:n] for n, c, _ in pairs], [s[:n] for n, _, s in pairs]

    def _draft_chains(
        self,
        rows: Sequence[RowView],
        texts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        fed: dict[int, list[int]],
    ) -> list[list[int]] | None:
        """Return the rows' drafts of these lengths by one call of the model, or None if it cannot.

        One call drafts for rows that are greedy or drawn with the judge's noise from all tokens. A row
        with more uncached tokens than a round leaves is read first. fed: each drafting row's tokens
        that are not cached yet.
        """
        if not (fed and self.shares_ids and self.model.drafts_whole_chains):
            return None
        draws: list[Draw | None] | None = None
        if any(row.sampling.method != "greedy" for row in rows):
            if not all(map(is_chain_drawn, rows)):
                return None
            draws = draws_of([rows[i] for i in fed])
        # every row takes the steps of the longest draft, and each step needs a position
        num_steps = max(lengths)
        if max(len(texts[i]) for i in fed) + num_steps - 1 > self._states.max_positions:
            return None
        flat, spans = self._states.ready([rows[i].id for i in fed], fed)
        states = [self._states[rows[i].id] for i in fed]
        chains = self.model.draft_chain(flat, spans, num_steps, self._num_tokens, draws)
        if chains is None:
            return None
        drafts: list[list[int]] = [[] for _ in rows]
        for i, state, chain in zip(fed, states, chains, strict=True):
            drafts[i] = chain[: lengths[i]]
            state.num_cached = len(texts[i])
            state.drafted = drafts[i][:-1]
        return drafts

    def _forward(
        self, states: list[CachedRow], fed: dict[int, list[int]], active: list[int]
    ) -> Tensor:
        """Return logits [R, V'] after each active row's last fed token."""
        spans = [
            Span(state.slot, state.num_cached + len(state.drafted), len(fed[i]))
            for state, i in zip(states, active, strict=True)
        ]
        flat = [token for i in active for token in fed[i]]
        return self._over_target(self.model.logits_after(self._states.as_known(flat), spans))

    # --- replay -----------------------------------------------------------------------------------

    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> DraftReplay:
        """Return the rounds that follow from one teacher-forced pass.

        Under a confidence stop the rounds are simulated instead, because the confidences after a first
        wrong token are not those along the text. Under a price stop these are the rounds at full
        length; `replay.price_stops` makes the priced rounds from their scores.
        """
        own, counts = self._own_text(prompt, trajectory[:-1])
        # [T] tokens that the context leaves to draft
        rooms = self.model.context_length + 1 - counts
        num_scored = int((rooms > 0).sum()) if len(trajectory) else 0
        scores = NO_SCORES
        if num_scored:
            logits = self._logits_along(prompt, own, counts[:num_scored] - 1)
            scores = score_positions(logits, trajectory[:num_scored], len(prompt), p, sampling)
        if self.stop.stop == "confidence":
            return SimulatedReplay(self, prompt, trajectory, scores, sampling)
        return ChainReplay(scores, rooms, self.num_draft_tokens)

    def _logits_along(
        self, prompt: Sequence[int], own: Sequence[int], places: np.ndarray
    ) -> Tensor:
        """Return logits [n, V'] float32 after places [n] of a text in the model's ids, ascending."""
        text = self._states.as_tensor(own[: places[-1] + 1])
        slot = self.model.acquire()
        try:
            with torch.inference_mode():
                if self.model.encoder is not None:
                    self.model.begin(slot, self._states.as_known(prompt))
                hidden = self.model.forward(text, [Span(slot, 0, len(text))])
                picked = torch.from_numpy(places).to(hidden.device)
                return self._over_target(self.model.unembed(hidden[picked])).float()
        finally:
            self.model.release(slot)
