"""A draft model with another tokenizer, which drafts the tokens that both tokenizers have.

Token-level intersection (arXiv 2502.05202). Symbols as in `draft_model`; S shared tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from paceline.drafting.base import Needs
from paceline.drafting.bridge import KIND
from paceline.drafting.draft_model import DraftModel
from paceline.models.translation import Readings, shared_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView
    from paceline.drafting.base import BuildContext
    from paceline.drafting.bridge import Bridge
    from paceline.drafting.draft_length import StopSettings
    from paceline.models.language_model import LanguageModel


@dataclass(slots=True)
class _Translated:
    """A row's text in the drafter's own ids."""

    ids: list[int] = field(default_factory=list)
    num_read: int = 0  # leading tokens of the row that were translated


class SharedTokens(DraftModel):
    """Drafts the tokens that both tokenizers have, in the target's ids.

    Its distribution is renormalised over them before warping, so drafts are sampled and judged by the
    same distribution. It reads other tokens of the text as several of its own.
    """

    kind: ClassVar[str] = KIND
    needs: ClassVar[Needs] = Needs()
    shares_ids: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        model: LanguageModel,
        settings: StopSettings,
        bridge: Bridge,
        context: BuildContext,
    ) -> None:
        width = context.target.num_logits
        super().__init__(
            name,
            model,
            settings.num_draft_tokens,
            num_tokens=width,
            num_logits=width,
            prefill_chunk=context.prefill_chunk,
            stop=settings,
        )
        self._bridge = bridge
        pairs = shared_tokens(bridge.target, bridge.own)
        self._readings = Readings(bridge.target, bridge.own, pairs)
        # a tokenizer may have more ids than its model has logits
        self._pairs = {t: o for t, o in pairs.items() if t < width and o < model.num_logits}
        self._target_ids = torch.tensor(list(self._pairs), device=model.device)  # [S]
        self._own_ids = torch.tensor(list(self._pairs.values()), device=model.device)  # [S]
        self._first = bridge.own.first()
        self._texts: dict[int, _Translated] = {}

    def start(self, rows: Sequence[RowView]) -> None:
        super().start(rows)
        for row in rows:
            self._texts[row.id] = _Translated()

    def finish(self, rows: Sequence[RowView]) -> None:
        super().finish(rows)
        for row in rows:
            self._texts.pop(row.id, None)

    def identity(self) -> dict[str, object]:
        return {**super().identity(), **self._bridge.identity()}

    def _text(self, row: RowView) -> Sequence[int]:
        text = self._texts[row.id]
        own, _ = self._translate(row.tokens[text.num_read :], text.ids)
        text.num_read = len(row.tokens)
        return own

    def _own_id(self, token: int) -> int:
        return self._pairs[token]

    def _own_text(self, tokens: Sequence[int]) -> tuple[Sequence[int], np.ndarray]:
        own, counts = self._translate(tokens, [])
        return own, np.array(counts)

    def _translate(self, tokens: Sequence[int], own: list[int]) -> tuple[list[int], list[int]]:
        """Append the own ids of tokens to `own`; return it and its length up to each token's end."""
        counts = []
        for token in tokens:
            reading = self._readings.of(token)
            if not own and [*reading] != self._first:
                own += self._first
            own += reading
            counts.append(len(own))
        return own, counts

    def _logits(self, hidden: Tensor) -> Tensor:
        own = self.model.unembed(hidden)
        logits = own.new_full((len(own), self._num_logits), float("-inf"))
        logits[:, self._target_ids] = own[:, self._own_ids]
        return logits
