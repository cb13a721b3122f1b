"""A small language model that drafts a chain, token by token.

Shares the target's vocabulary. Greedy rows get its most likely tokens; sampled rows get draws
from its warped distribution q, with the judge's own noise under `invariant` sampling. When a chain
ends before its full length is for `stops.py` to say. Published as speculative decoding (arXiv
2211.17192). Symbols: R = rows, K = draft length, T = trajectory tokens, V = the target's logits width.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import BaseModel

from paceline.config import ModelSection
from paceline.contracts import GREEDY, Drafts
from paceline.drafting.base import Drafter, Foresight, Needs, PositionScores
from paceline.drafting.drawing import draw, draw_along, empty_probs
from paceline.drafting.foresight import ChainForesight, SimulatedForesight
from paceline.drafting.stops import (
    FIXED_LENGTH,
    ExpectedGainStop,
    StopSettings,
    confidences,
    stop_rule,
)
from paceline.models.cache import BLOCK
from paceline.models.loading import load_language_model, load_tokenizer
from paceline.models.packing import Span
from paceline.models.vocabulary import Vocabulary, check_same_vocabulary
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.costs.table import CostTable
    from paceline.drafting.base import Surroundings
    from paceline.models.language_model import LanguageModel


class DraftModelSettings(ModelSection, StopSettings):
    """A model, how many tokens it drafts a round at most, and what may end a draft before."""


@dataclass(slots=True)
class _RowState:
    slot: int
    num_cached: int = 0  # leading tokens of the row whose keys and values are cached
    drafted: list[int] = field(default_factory=list)  # cached beyond them, not yet known accepted

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Count those drafted tokens as cached text that the target went on to accept."""
        for token in self.drafted:
            if self.num_cached >= len(tokens) or tokens[self.num_cached] != token:
                break
            self.num_cached += 1
        self.drafted = []
        # at least the last token is fed again, because its successor's logits are needed
        self.num_cached = min(self.num_cached, len(tokens) - 1)


class DraftModel(Drafter):
    kind: ClassVar[str] = "draft_model"
    nests: ClassVar[bool] = True
    Settings: ClassVar[type[BaseModel]] = DraftModelSettings
    needs: ClassVar[Needs] = Needs(same_vocabulary=True)
    shares_ids: ClassVar[bool] = True  # what it draws is fed to it as it is

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
        self._chunk = prefill_chunk
        self._states: dict[int, _RowState] = {}
        self._rule = stop_rule(name, self.stop)

    @classmethod
    def check(cls, name: str, settings: DraftModelSettings, vocabulary: Vocabulary) -> None:
        check_same_vocabulary(name, vocabulary, Vocabulary.of(load_tokenizer(settings)))

    @classmethod
    def build(cls, name: str, settings: DraftModelSettings, around: Surroundings) -> DraftModel:
        model = load_language_model(settings, name)
        return cls.beside(name, model, settings.num_draft_tokens, around, settings)

    @classmethod
    def beside(
        cls,
        name: str,
        model: LanguageModel,
        num_draft_tokens: int,
        around: Surroundings,
        stop: StopSettings | None = None,
    ) -> DraftModel:
        """The drafter of a model already loaded, beside its target."""
        return cls(
            name,
            model,
            num_draft_tokens=num_draft_tokens,
            num_tokens=around.vocabulary.num_tokens,
            num_logits=around.target.num_logits,
            prefill_chunk=around.prefill_chunk,
            stop=stop,
        )

    def start(self, rows: Sequence[RowView]) -> None:
        if self.model.has_changed():
            # rows in flight keep caches of the old weights: worse drafts, never wrong text
            self.model.reload()
        for row in rows:
            self._states[row.id] = _RowState(self.model.acquire())
        for state in self._states.values():
            # under a bound, each row has less room when there are more rows
            if state.num_cached + len(state.drafted) > self._most_positions:
                state.num_cached, state.drafted = 0, []
                self.model.cache.forget(state.slot)

    @property
    def _most_positions(self) -> int:
        """Positions per row that the model's context and the cache's bound allow."""
        bound = self.model.cache.max_length
        length = self.model.context_length
        return length if bound is None else min(length, bound)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        """Cache up to `max_tokens` more tokens, of all but the last."""
        state, text = self._states[row.id], self._text(row)
        stop = min(len(text) - 1, self._most_positions)
        end = min(stop, state.num_cached + max_tokens)
        if state.num_cached < end:
            chunk = self._known(text[state.num_cached : end])
            span = Span(state.slot, state.num_cached, end - state.num_cached)
            self.model.forward(chunk, [span])
            state.num_cached = end
        return end >= stop

    def finish(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            state = self._states.pop(row.id, None)
            if state is not None:
                # one that overflowed leaves numbers behind that are none
                self.model.release(state.slot, damaged=True)

    def identity(self) -> dict[str, object]:
        stop = self.stop.stop_identity()
        return {**super().identity(), "model": self.model.fingerprint(), **stop}

    def num_bytes(self) -> int:
        return self.model.num_bytes() + self.model.cache.num_bytes()

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

    @contextmanager
    def at_full_length(self) -> Iterator[None]:
        rule, self._rule = self._rule, FIXED_LENGTH
        try:
            yield
        finally:
            self._rule = rule

    # --- the text in the model's own ids ----------------------------------------------------------

    def _text(self, row: RowView) -> Sequence[int]:
        """The row's text so far, which only ever grows."""
        return row.tokens

    def _own(self, token: int) -> int:
        """The model's id of a token it drafted."""
        return token

    def _read(self, tokens: Sequence[int]) -> tuple[Sequence[int], np.ndarray]:
        """(the model's ids, [n] how many of them the text has by the end of each token)."""
        return tokens, np.arange(1, len(tokens) + 1)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[R, V'] in the target's ids, V' at most V, of final hidden states [R, D]."""
        return self.model.unembed(hidden)[:, : self._num_tokens]

    def _draft_chains(
        self,
        rows: Sequence[RowView],
        lengths: Sequence[int],
        fed: dict[int, list[int]],
        tokens: Tensor,
    ) -> bool:
        """Fill `tokens` in one go, or return False: rows are sampled, or have more to catch up with
        than the token or two that a round leaves.

        fed: each drafting row's tokens that are not cached yet.
        """
        greedy = all(row.sampling.method == "greedy" for row in rows)
        if not fed or not greedy or any(len(new) > 2 for new in fed.values()):
            return False
        states = {i: self._states[rows[i].id] for i in fed}
        spans = [Span(states[i].slot, states[i].num_cached, len(new)) for i, new in fed.items()]
        flat = self._known([token for new in fed.values() for token in new])
        chains = self.model.draft_chain(flat, spans, max(lengths), self._num_tokens)
        if chains is None:
            return False
        for (i, state), chain in zip(states.items(), chains.tolist(), strict=True):
            tokens[i, : lengths[i]] = torch.tensor(chain[: lengths[i]])
            state.num_cached = len(rows[i].tokens)
            state.drafted = chain[: lengths[i] - 1]
        return True

    def _known(self, tokens: Sequence[int]) -> Tensor:
        """Tokens as a tensor; an id from the padding of the target's wider table as the last id."""
        return torch.tensor(tokens).clamp_(max=self.model.num_logits - 1)

    def keep(self, row: RowView, num_tokens: int) -> None:
        """Forget what is cached of a row beyond its first tokens, where its text was rewritten."""
        state = self._states[row.id]
        if num_tokens < state.num_cached:
            state.num_cached, state.drafted = num_tokens, []

    # --- drafting ---------------------------------------------------------------------------------

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        texts = [self._text(row) for row in rows]
        most = [self._length(text, limit) for text, limit in zip(texts, limits, strict=True)]
        width = max(most)
        tokens = torch.full((len(rows), width), -1, dtype=torch.int64)
        probs = empty_probs(rows, width, self._num_logits, self.model.device)
        # rows sorted by slot make one attention call
        active = sorted(
            (i for i, n in enumerate(most) if n), key=lambda i: self._states[rows[i].id].slot
        )
        fed = {i: self._catch_up(rows[i], texts[i]) for i in active}
        if (
            self.model.drafts_whole_chains
            and self.shares_ids
            and self._rule is FIXED_LENGTH
            and self._draft_chains(rows, most, fed, tokens)
        ):
            return Drafts(tokens, most)
        sure: dict[int, list[float]] = {i: [] for i in active}
        lengths = [0] * len(rows)
        for step in range(width):
            active = [i for i in active if most[i] > step and self._goes_on(rows[i], sure[i])]
            if not active:
                break
            logits = self._forward([self._states[rows[i].id] for i in active], fed, active)
            drawn = draw([rows[i] for i in active], logits, step, probs, active)
            for i, token in zip(active, drawn.tolist(), strict=True):
                tokens[i, step] = token
                lengths[i] += 1
                state = self._states[rows[i].id]
                if step == 0:
                    state.num_cached = len(texts[i])
                else:
                    state.drafted.extend(fed[i])
                fed[i] = [self._own(token)]
            if self._rule is not FIXED_LENGTH and step + 1 < width:
                for i, c in zip(active, confidences(logits).tolist(), strict=True):
                    sure[i].append(c)
        width = max(lengths)
        return Drafts(tokens[:, :width], lengths, None if probs is None else probs[:, :width])

    def _catch_up(self, row: RowView, text: Sequence[int]) -> list[int]:
        """Bring the row's cache up to a chunk before the text's end; the tokens still to feed."""
        state = self._states[row.id]
        state.catch_up(text)
        while len(text) - state.num_cached > self._chunk:
            self.prepare(row, self._chunk)
        return list(text[state.num_cached :])

    def _goes_on(self, row: RowView, sure: Sequence[float]) -> bool:
        # the last token of a row is never cached between rounds
        return not sure or self._rule.goes_on(sure, len(row.tokens) - 1)

    def _length(self, text: Sequence[int], limit: int) -> int:
        """Return how many tokens to draft: each one that is fed needs a position in the cache."""
        room = self._most_positions - len(text) + 1
        return max(0, min(limit, self.num_draft_tokens, room))

    def _forward(
        self, states: list[_RowState], fed: dict[int, list[int]], active: list[int]
    ) -> Tensor:
        """Logits [R, V'] behind each active row's last fed token."""
        spans = [
            Span(state.slot, state.num_cached + len(state.drafted), len(fed[i]))
            for state, i in zip(states, active, strict=True)
        ]
        flat = [token for i in active for token in fed[i]]
        hidden = self.model.forward(self._known(flat), spans)
        if len(flat) > len(spans):
            ends = torch.tensor([span.width for span in spans]).cumsum(0) - 1
            hidden = hidden[ends.to(hidden.device)]
        return self._logits(hidden)

    # --- replay -----------------------------------------------------------------------------------

    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> Foresight:
        """One teacher-forced pass: a chain survives as long as the drafter's own token matches.

        Where confidence ends drafts, the rounds are simulated beside it, since the confidences behind
        a first wrong token are not along the text. Where prices end them, these are the rounds at
        full length: `replay.price_stops` makes the priced ones of their scores.
        """
        scores, rooms = self._score(prompt, trajectory, p, sampling)
        if self.stop.stop == "confidence":
            return SimulatedForesight(self, prompt, trajectory, scores, sampling)
        return ChainForesight(scores, rooms, self.num_draft_tokens)

    def _score(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None,
        sampling: SamplingParams,
    ) -> tuple[PositionScores, np.ndarray]:
        """(scores, [T] tokens that the model's context leaves room to draft at each position)."""
        own, counts = self._read([*prompt, *trajectory[:-1]])
        counts = counts[len(prompt) - 1 :]  # by the end of the prompt, and of each output token
        rooms = self.model.context_length + 1 - counts
        num_scored = int((rooms > 0).sum()) if len(trajectory) else 0
        if not num_scored:
            empty = np.zeros(0, dtype=np.float32)
            return PositionScores(empty.astype(bool), empty, empty, empty), rooms
        text = self._known(own[: counts[num_scored - 1]])
        places = torch.from_numpy(counts[:num_scored] - 1)
        slot = self.model.acquire()
        try:
            with torch.inference_mode():
                hidden = self.model.forward(text, [Span(slot, 0, len(text))])
                logits = self._logits(hidden[places.to(hidden.device)]).float()
        finally:
            self.model.release(slot)
        truth = torch.tensor(trajectory[:num_scored])
        if sampling.method == "greedy":
            own_tokens = logits.argmax(dim=-1).cpu()
        else:
            q = warp(logits, sampling).cpu()
            own_tokens = draw_along(q, sampling.seed, len(prompt))
        match = own_tokens == truth
        ratio = overlap = torch.full((len(truth),), float("nan"))
        if p is not None:
            if sampling.method == "greedy":
                q = logits.softmax(dim=-1).cpu()
            p = p[: len(truth), : q.shape[-1]].float()
            inside = truth < q.shape[-1]
            at = torch.where(inside, truth, 0)[:, None]
            ratio = (q.gather(1, at) / p.gather(1, at)).clamp(max=1.0)[:, 0]
            ratio = torch.where(inside, ratio, 0.0)
            overlap = torch.minimum(p, q).sum(dim=-1)
        sure = confidences(logits).cpu()
        return (
            PositionScores(match.numpy(), ratio.numpy(), overlap.numpy(), sure.numpy()),
            rooms,
        )
