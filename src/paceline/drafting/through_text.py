"""A draft model with another tokenizer, whose drafts reach the target as text.

String-level exact match (arXiv 2502.05202).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from paceline.contracts import Drafts
from paceline.drafting.base import Drafter, Needs, pad_drafts
from paceline.drafting.bridge import KIND
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.draft_replay import SimpleRow
from paceline.models.translation import RunningText, special_pairs, split_incomplete

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import RowView
    from paceline.costs.table import CostTable
    from paceline.drafting.base import BuildContext
    from paceline.drafting.bridge import Bridge
    from paceline.drafting.draft_length import StopSettings
    from paceline.models.language_model import LanguageModel


@dataclass(slots=True, kw_only=True)
class _OwnRow(SimpleRow):
    """A row as the drafter's own tokenizer reads it, for the draft model inside."""

    text: RunningText

    def catch_up(self, tokens: Sequence[int]) -> int:
        """Read the target's tokens; return the number of leading own ids that did not change."""
        before, same = self.tokens, self.text.num_closed
        self.tokens = self.text.extend(tokens)
        while same < min(len(before), len(self.tokens)) and before[same] == self.tokens[same]:
            same += 1
        return same


class ThroughText(Drafter):
    """Drafts greedily in its own tokens; the target's tokenizer reads the text of the draft.

    The draft is a function of the text, so it is judged exactly under every sampling method. Inside is
    a plain draft model of the re-encoded text; its cache is kept for the tokens that did not change.
    """

    kind: ClassVar[str] = KIND
    needs: ClassVar[Needs] = Needs()

    def __init__(
        self,
        name: str,
        model: LanguageModel,
        settings: StopSettings,
        bridge: Bridge,
        context: BuildContext,
    ) -> None:
        super().__init__(name, settings.num_draft_tokens)
        self.model = model
        self._bridge = bridge
        self._inside = DraftModel(
            name,
            model,
            settings.num_draft_tokens,
            num_tokens=bridge.own.num_tokens,
            num_logits=model.num_logits,
            prefill_chunk=context.prefill_chunk,
            stop=settings,
        )
        self._specials = special_pairs(bridge.target, bridge.own)
        self._target_specials = {own: token for token, own in self._specials.items()}
        self._rows: dict[int, _OwnRow] = {}

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            text = RunningText(self._bridge.target, self._bridge.own, self._specials)
            self._rows[row.id] = _OwnRow(tokens=[], num_prompt=row.num_prompt, id=row.id, text=text)
        self._inside.start(rows)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        own = self._rows[row.id]
        self._inside.keep(own, own.catch_up(row.tokens))
        return self._inside.prepare(own, max_tokens)

    def finish(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._rows.pop(row.id, None)
        self._inside.finish(rows)

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        own_rows = [self._rows[row.id] for row in rows]
        for row, own in zip(rows, own_rows, strict=True):
            self._inside.keep(own, own.catch_up(row.tokens))
        # without a token that the drafter can read there is nothing to draft from
        limits = [n if own.tokens else 0 for n, own in zip(limits, own_rows, strict=True)]
        drafted = self._inside.propose(own_rows, limits)
        drafts = []
        for i, own in enumerate(own_rows):
            ids = drafted.tokens[i, : drafted.lengths[i]].tolist()
            drafts.append(self._target_tokens(own.text, ids)[: max(0, limits[i])])
        most = self.num_draft_tokens
        return Drafts(*pad_drafts([d[:most] for d in drafts], torch.device("cpu")))

    def _target_tokens(self, text: RunningText, ids: Sequence[int]) -> list[int]:
        """Return the target's tokens for own ids that were drafted after a text."""
        own = self._bridge.own
        end = next((k for k, i in enumerate(ids) if i in own.special), len(ids))
        drafted = own.join(ids[:end])
        last = self._target_specials.get(ids[end]) if end < len(ids) else None
        if last is None:
            drafted, _ = split_incomplete(drafted)
        if not drafted.startswith(text.held):
            return []
        rest = drafted[len(text.held) :]
        tokens = self._bridge.target.behind(text.text, rest) if rest else []
        if tokens is None:
            return []
        return tokens if last is None else [*tokens, last]

    def price(self, costs: CostTable) -> None:
        self._inside.price(costs)

    def at_full_length(self) -> AbstractContextManager[None]:
        return self._inside.at_full_length()

    def identity(self) -> dict[str, object]:
        return {**self._inside.identity(), **self._bridge.identity()}

    def num_bytes(self) -> int:
        return self._inside.num_bytes()

    def bound_cache(self, max_positions: int | None, exact_fit: bool) -> None:
        self._inside.bound_cache(max_positions, exact_fit)

    def state_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes for rows of equally many own ids."""
        return self._inside.state_bytes(lengths)
