"""The target's prefill: pieces of prompts between rounds, and each row's first token.

Prompts that begin alike share blocks of their prefill, see `prefixes`. This module knows no drafter
and no policy. Symbols: N tokens of a forward, D hidden size.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from paceline.drafting.contract import Draft
from paceline.engine.prefixes import PromptHidden
from paceline.models.packing import PREFILL_BLOCK, Span
from paceline.models.scores import Scores
from paceline.verification import judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from paceline.engine.prefixes import PrefixStore
    from paceline.engine.rows import Row
    from paceline.models.detokenizer import Detokenizer
    from paceline.models.language_model import LanguageModel


class _Piece(NamedTuple):
    row: Row
    start: int
    stop: int


class Prefill:
    """The prefill of one engine's rows, at most `chunk` tokens per step."""

    def __init__(
        self,
        target: LanguageModel,
        detokenizer: Detokenizer,
        prefixes: PrefixStore,
        chunk: int,
    ) -> None:
        self._target = target
        self._detokenizer = detokenizer
        self._prefixes = prefixes
        self._chunk = chunk

    def load_prefix(self, row: Row) -> None:
        """Write the known beginning of a new row's prompt into its slot.

        A source is not shared: an encoder's state at any token depends on all of them.
        """
        if self._target.encoder is not None:
            return
        totals = self._prefixes.load(row.request.prompt_tokens, self._target.cache, row.slot)
        if totals:
            row.num_cached = len(totals) * PREFILL_BLOCK
            row.prompt_hidden = PromptHidden(row.num_cached, totals[-1], totals)

    def step(self, rows: Iterable[Row]) -> list[Row]:
        """Run one forward over pieces of prompts; return the rows that have their first token now."""
        pieces = self._next_pieces([row for row in rows if not row.is_prefilled])
        if not pieces:
            return []
        began = perf_counter()
        if self._target.encoder is not None:
            for row, start, _ in pieces:
                if start == 0:
                    self._read_source(row)
        tokens = [t for row, start, stop in pieces for t in row.start_of_text(start, stop)]
        spans = [Span(row.slot, start, stop - start, prefill=True) for row, start, stop in pieces]
        hidden = self._target.forward(torch.tensor(tokens), spans)  # [N, D]
        ending: list[Row] = []
        last: list[Tensor] = []
        parts = torch.split(hidden, [span.width for span in spans])
        for (row, _, stop), part in zip(pieces, parts, strict=True):
            if self._target.encoder is None:
                row.prompt_hidden.add(part)
            row.num_cached = stop
            if row.is_prefilled:
                row.prompt_hidden.last = part[-1].float().cpu().numpy()
                ending.append(row)
                last.append(part[-1])
        if ending:
            self._first_tokens(ending, torch.stack(last))
        spent = perf_counter() - began
        for row, start, stop in pieces:
            row.seconds.prefill += spent * (stop - start) / len(tokens)
        return [row for row in ending if row.finish_reason is None]

    def _read_source(self, row: Row) -> None:
        """Encode a new row's source; the policy's features are of the encoder's hidden states."""
        features = row.request.features
        source = row.request.prompt_tokens if features is None else features
        hidden = self._target.begin(row.slot, source)
        row.prompt_hidden.add(hidden)

    def _next_pieces(self, rows: Iterable[Row]) -> list[_Piece]:
        """Return the pieces of the next forward. rows: those that are not prefilled."""
        pieces: list[_Piece] = []
        room = self._chunk
        for row in sorted(rows, key=lambda row: row.id):
            if room and row.finish_reason is None:
                stop = min(row.num_start, row.num_cached + room)
                pieces.append(_Piece(row, row.num_cached, stop))
                room -= stop - row.num_cached
        return sorted(pieces, key=lambda piece: piece.row.slot)

    def _first_tokens(self, rows: Sequence[Row], last: Tensor) -> None:
        """Append the first token of rows whose prompt is cached. last: [rows, D]."""
        logits = self._target.unembed(last)
        verdicts = judge(rows, [Draft([]) for _ in rows], Scores.of(logits))
        for row, verdict, row_logits in zip(rows, verdicts, logits, strict=True):
            if verdict.error is not None:
                row.fail(verdict.error, verdict.cause)
                continue
            if self._target.encoder is None:
                totals = row.prompt_hidden.block_totals
                self._prefixes.keep(row.request.prompt_tokens, self._target.cache, row.slot, totals)
            token = verdict.next_token
            if row.request.logprobs:
                row.logprobs.append(float(row_logits.float().log_softmax(dim=-1)[token]))
            row.append_until_stop([token], self._detokenizer)
