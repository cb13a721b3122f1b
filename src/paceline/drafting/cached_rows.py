"""The rows of a draft model in its own cache, and their prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from paceline.contracts import RowView
    from paceline.models.language_model import LanguageModel


@dataclass(slots=True)
class CachedRow:
    """The cached tokens of one row."""

    slot: int
    num_cached: int = 0  # leading tokens of the text whose keys and values are cached
    drafted: list[int] = field(default_factory=list)  # cached beyond them, not yet known accepted
    has_source: bool = False  # whether the model's encoder has read the row's source

    def count_accepted(self, tokens: Sequence[int]) -> None:
        """Count the drafted tokens that the target accepted as cached text."""
        num_cached, num_tokens = self.num_cached, len(tokens)
        for token in self.drafted:
            if num_cached >= num_tokens or tokens[num_cached] != token:
                break
            num_cached += 1
        self.drafted = []
        # the last token is always fed again, because the next token's logits are needed
        self.num_cached = min(num_cached, num_tokens - 1)


class CachedRows(dict[int, CachedRow]):
    """The cached rows of one model, by id. Texts are in the model's own token ids."""

    def __init__(self, model: LanguageModel, chunk: int) -> None:
        """chunk: maximum number of tokens per forward of the prefill."""
        super().__init__()
        self._model = model
        self._chunk = chunk

    @property
    def max_positions(self) -> int:
        """Number of positions per row that the model's context and the cache's bound allow."""
        bound = self._model.cache.max_length
        length = self._model.context_length
        return length if bound is None else min(length, bound)

    def start(self, rows: Iterable[RowView]) -> None:
        for row in rows:
            self[row.id] = CachedRow(self._model.acquire())
        for state in self.values():
            # under a bound, more rows leave each row fewer positions
            if state.num_cached + len(state.drafted) > self.max_positions:
                state.num_cached, state.drafted = 0, []
                self._model.cache.forget(state.slot)

    def read_source(self, row: RowView) -> None:
        """Let the model's encoder, if it has one, read a row's source, once."""
        state = self[row.id]
        if self._model.encoder is not None and not state.has_source:
            source = self.as_known(row.tokens[: row.num_prompt])
            self._model.begin(state.slot, source if row.features is None else row.features)
            state.has_source = True

    def prepare(self, row_id: int, text: Sequence[int], max_tokens: int) -> bool:
        """Cache up to `max_tokens` more tokens of a text, never its last; return True at its end."""
        state = self[row_id]
        stop = min(len(text) - 1, self.max_positions)
        end = min(stop, state.num_cached + max_tokens)
        if state.num_cached < end:
            piece = self.as_tensor(text[state.num_cached : end])
            span = Span(state.slot, state.num_cached, end - state.num_cached)
            self._model.forward(piece, [span])
            state.num_cached = end
        return end >= stop

    def catch_up(self, row_id: int, text: Sequence[int]) -> list[int]:
        """Cache a row's text up to its last chunk; return the tokens still to feed."""
        state = self[row_id]
        state.count_accepted(text)
        while len(text) - state.num_cached > self._chunk:
            self.prepare(row_id, text, self._chunk)
        return list(text[state.num_cached :])

    def ready(
        self, row_ids: Sequence[int], fed: dict[int, list[int]]
    ) -> tuple[list[int], list[Span]]:
        """Return the tokens to feed and their spans, at most two tokens per row as a round leaves them.

        row_ids: of the rows in `fed`, in its order. fed: tokens of each that are not cached yet. A row
        with more of them is read first, and only its last token is left in `fed`.
        """
        of_late = [(i, row_id) for i, row_id in zip(fed, row_ids, strict=True) if len(fed[i]) > 2]
        if of_late:
            self._read_all_but_last([(self[row_id], fed[i]) for i, row_id in of_late])
            fed |= {i: fed[i][-1:] for i, _ in of_late}
        flat: list[int] = []
        spans: list[Span] = []
        for row_id, new in zip(row_ids, fed.values(), strict=True):
            state = self[row_id]
            flat += new
            spans.append(Span(state.slot, state.num_cached, len(new)))
        return self.as_known(flat), spans

    def _read_all_but_last(self, late: Sequence[tuple[CachedRow, list[int]]]) -> None:
        """Cache the tokens still to feed of some rows, except the last of each: one forward."""
        flat: list[int] = []
        spans: list[Span] = []
        for state, tokens in late:
            flat += tokens[:-1]
            spans.append(Span(state.slot, state.num_cached, len(tokens) - 1))
            state.num_cached += len(tokens) - 1
        self._model.forward(self.as_tensor(flat), spans)

    def keep(self, row_id: int, num_tokens: int) -> None:
        state = self[row_id]
        if num_tokens < state.num_cached:
            state.num_cached, state.drafted = num_tokens, []

    def finish(self, rows: Iterable[RowView]) -> None:
        for row in rows:
            state = self.pop(row.id, None)
            if state is not None:
                # after an overflow the slot holds values that are not numbers
                self._model.release(state.slot, damaged=True)

    def as_known(self, tokens: Sequence[int]) -> list[int]:
        """Return ids of the model; ids from the padding of a wider target become the last id."""
        last = self._model.num_logits - 1
        return [token if token < last else last for token in tokens]

    def as_tensor(self, tokens: Sequence[int]) -> Tensor:
        """Return `as_known` as a tensor."""
        return torch.tensor(self.as_known(tokens))
