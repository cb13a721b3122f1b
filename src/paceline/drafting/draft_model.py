"""A small language model that drafts a chain, token by token.

Shares the target's vocabulary. Greedy rows get its most likely tokens; sampled rows get draws
from its warped distribution q, with the judge's own noise under `invariant` sampling. Published as
speculative decoding (arXiv 2211.17192). Symbols: K = draft length, V = the target's logits width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import torch
from pydantic import BaseModel, Field

import paceline.noise as noise
from paceline.config import ModelSection
from paceline.contracts import Drafts
from paceline.drafting.base import Drafter, Foresight, Needs, PositionScores
from paceline.models.loading import load_language_model, load_tokenizer
from paceline.models.packing import Span
from paceline.models.vocabulary import Vocabulary, check_same_vocabulary
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView
    from paceline.drafting.base import Surroundings
    from paceline.models.language_model import LanguageModel


# methods whose judge weighs the drafter's distribution; for the others its noise is the judge's
_STOCHASTIC: Final = ("residual", "block")


class DraftModelSettings(ModelSection):
    """A model and how many tokens it drafts a round."""

    num_draft_tokens: int = Field(default=4, ge=1, le=64)


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
    Settings: ClassVar[type[BaseModel]] = DraftModelSettings
    needs: ClassVar[Needs] = Needs(same_vocabulary=True)

    def __init__(
        self,
        name: str,
        model: LanguageModel,
        num_draft_tokens: int,
        num_tokens: int,
        num_logits: int,
        prefill_chunk: int = 512,
    ) -> None:
        """num_tokens: ids that exist in the shared vocabulary; num_logits: the target's width V."""
        super().__init__(name, num_draft_tokens)
        self.model = model
        self._num_tokens = min(num_tokens, model.num_logits)
        self._num_logits = num_logits
        self._chunk = prefill_chunk
        self._states: dict[int, _RowState] = {}

    @classmethod
    def check(cls, name: str, settings: DraftModelSettings, vocabulary: Vocabulary) -> None:
        check_same_vocabulary(name, vocabulary, Vocabulary.of(load_tokenizer(settings)))

    @classmethod
    def build(cls, name: str, settings: DraftModelSettings, around: Surroundings) -> DraftModel:
        model = load_language_model(settings, name)
        return cls.beside(name, model, settings.num_draft_tokens, around)

    @classmethod
    def beside(
        cls, name: str, model: LanguageModel, num_draft_tokens: int, around: Surroundings
    ) -> DraftModel:
        """The drafter of a model already loaded, beside its target."""
        return cls(
            name,
            model,
            num_draft_tokens=num_draft_tokens,
            num_tokens=around.vocabulary.num_tokens,
            num_logits=around.target.num_logits,
            prefill_chunk=around.prefill_chunk,
        )

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states[row.id] = _RowState(self.model.acquire())

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        """Cache up to `max_tokens` more tokens, of all but the last."""
        state = self._states[row.id]
        stop = min(len(row.tokens) - 1, self.model.context_length)
        end = min(stop, state.num_cached + max_tokens)
        if state.num_cached < end:
            chunk = self._known(row.tokens[state.num_cached : end])
            span = Span(state.slot, state.num_cached, end - state.num_cached)
            self.model.forward(chunk, [span])
            state.num_cached = end
        return end >= stop

    def finish(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            state = self._states.pop(row.id, None)
            if state is not None:
                self.model.release(state.slot)

    def identity(self) -> dict[str, object]:
        return {**super().identity(), "model": self.model.fingerprint()}

    def num_bytes(self) -> int:
        return self.model.num_bytes() + self.model.cache.num_bytes()

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        lengths = [self._length(row, limit) for row, limit in zip(rows, limits, strict=True)]
        width = max(lengths)
        wants_probs = any(row.sampling.method in _STOCHASTIC for row in rows)
        tokens = torch.full((len(rows), width), -1, dtype=torch.int64)
        probs = None
        if wants_probs:
            shape = len(rows), width, self._num_logits
            probs = torch.zeros(shape, device=self.model.device)
        # rows sorted by slot make one attention call
        order = sorted(
            (i for i, n in enumerate(lengths) if n), key=lambda i: self._states[rows[i].id].slot
        )
        for i in order:
            state = self._states[rows[i].id]
            state.catch_up(rows[i].tokens)
            while len(rows[i].tokens) - state.num_cached > self._chunk:
                self.prepare(rows[i], self._chunk)
        fed = {i: list(rows[i].tokens[self._states[rows[i].id].num_cached :]) for i in order}
        if self.model.drafts_whole_chains and self._draft_chains(rows, lengths, fed, tokens):
            return Drafts(tokens, lengths)
        for step in range(width):
            active = [i for i in order if lengths[i] > step]
            logits = self._forward([self._states[rows[i].id] for i in active], fed, active)
            drawn = self._draw([rows[i] for i in active], logits, step, probs, active)
            for i, token in zip(active, drawn.tolist(), strict=True):
                tokens[i, step] = token
                state = self._states[rows[i].id]
                if step == 0:
                    state.num_cached = len(rows[i].tokens)
                else:
                    state.drafted.extend(fed[i])
                fed[i] = [token]
        return Drafts(tokens, lengths, probs)

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
        # always the full length: fewer shapes, and a row that wants less is near its end
        chains = self.model.draft_chain(flat, spans, self.num_draft_tokens, self._num_tokens)
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

    def _length(self, row: RowView, limit: int) -> int:
        """Tokens to draft: every token that is fed needs a position within the model's context."""
        room = self.model.context_length - len(row.tokens) + 1
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
        return self.model.unembed(hidden)[:, : self._num_tokens]

    def _draw(
        self,
        rows: list[RowView],
        logits: Tensor,
        step: int,
        probs: Tensor | None,
        active: list[int],
    ) -> Tensor:
        """Each row's drafted token [R]; q goes into `probs` where residual judging needs it."""
        if all(row.sampling.method == "greedy" for row in rows):
            return logits.argmax(dim=-1).cpu()
        drawn = torch.empty(len(rows), dtype=torch.int64)
        for r, row in enumerate(rows):
            if row.sampling.method == "greedy":
                drawn[r] = logits[r].argmax()
                continue
            q = warp(logits[r], row.sampling)
            stochastic = row.sampling.method in _STOCHASTIC
            stream = noise.DRAFT if stochastic else noise.TARGET
            position = torch.tensor(len(row.tokens) + step, device=q.device)
            if row.sampling.method == "block":
                position = noise.of_round(position, len(row.tokens))
            seed = torch.tensor(row.sampling.seed, device=q.device)
            e = noise.exponential(seed, position, stream, self._num_logits)
            drawn[r] = noise.race(q, e[: q.shape[-1]])
            if stochastic and probs is not None:
                probs[active[r], step, : q.shape[-1]] = q
        return drawn

    def would_accept(
        self, prompt: Sequence[int], trajectory: Sequence[int], p: Tensor | None
    ) -> Foresight:
        """One teacher-forced pass: a greedy chain survives as long as its argmax matches."""
        room = max(0, self.model.context_length - len(prompt) + 1)
        scores = self._score(prompt, trajectory[:room], p)
        return _ChainForesight(scores, room, self.num_draft_tokens)

    def _score(
        self, prompt: Sequence[int], trajectory: Sequence[int], p: Tensor | None
    ) -> PositionScores:
        if not trajectory:
            empty = np.zeros(0, dtype=np.float32)
            return PositionScores(empty.astype(bool), empty, empty, empty)
        text = self._known([*prompt, *trajectory[:-1]])
        slot = self.model.acquire()
        try:
            with torch.inference_mode():
                hidden = self.model.forward(text, [Span(slot, 0, len(text))])
                logits = self.model.unembed(hidden[len(prompt) - 1 :])[:, : self._num_tokens]
                logits = logits.float()
                q = logits.softmax(dim=-1).cpu()
        finally:
            self.model.release(slot)
        truth = torch.tensor(trajectory)
        match = logits.argmax(dim=-1).cpu() == truth
        ratio = overlap = torch.full((len(truth),), float("nan"))
        if p is not None:
            p = p[: len(truth), : q.shape[-1]].float()
            at = truth[:, None]
            ratio = (q.gather(1, at) / p.gather(1, at)).clamp(max=1.0)[:, 0]
            overlap = torch.minimum(p, q).sum(dim=-1)
        confidence = q.amax(dim=-1)
        return PositionScores(match.numpy(), ratio.numpy(), overlap.numpy(), confidence.numpy())


class _ChainForesight(Foresight):
    """Rounds read off the run of matching positions."""

    def __init__(self, scores: PositionScores, room: int, num_draft_tokens: int) -> None:
        """room: how many tokens past the prompt the drafter's own context allows it to predict."""
        self.scores = scores
        self._room = room
        self._num_draft_tokens = num_draft_tokens
        # run[i]: matches in a row from position i on
        self._run = np.zeros(len(scores.match) + 1, dtype=np.int64)
        for i in range(len(scores.match) - 1, -1, -1):
            self._run[i] = self._run[i + 1] + 1 if scores.match[i] else 0

    def accepted(self, position: int, limit: int) -> tuple[int, int]:
        drafted = max(0, min(limit, self._num_draft_tokens, self._room - position))
        matches = int(self._run[position]) if position < len(self._run) else 0
        return drafted, min(drafted, matches)
