"""A draft model whose tokenizer is not the target's: the levels of a `Bridge` and their drafters.

same: equal ids, so it is a plain draft model. shared: enough common tokens, so it drafts the target's
ids, as `SharedTokens` (token-level intersection, arXiv 2502.05202). text: its greedy draft is written
out and read by the target's tokenizer, by `ThroughText` (string-level exact match, same paper).
Symbols as in `draft_model`; S shared tokens.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch

from paceline.contracts import Drafts
from paceline.drafting.base import Drafter, Needs, pad_drafts
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.draft_replay import SimpleRow
from paceline.models.translation import (
    RunningText,
    TokenBytes,
    TokenTranslation,
    share_cut_alike,
    share_of_vocabulary,
    shared_tokens,
    special_pairs,
    split_incomplete,
)
from paceline.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from paceline.contracts import RowView
    from paceline.costs.table import CostTable
    from paceline.drafting.base import BuildContext
    from paceline.drafting.draft_length import StopSettings
    from paceline.models.language_model import LanguageModel
    from paceline.models.vocabulary import Tokenizer
    from paceline.store.trained_on import TrainedOn

Level = Literal["same", "shared", "text"]

KIND: Final = "cross_vocabulary"

# Below these shares a drafter of common tokens would read text that is cut unlike its training text, or
# could not express most of its drafts.
_MIN_CUT_ALIKE: Final = 0.8
_MIN_COMMON: Final = 0.5


@dataclass(frozen=True, slots=True)
class Bridge:
    """The bytes of both tokenizers' tokens, the level, and the reason for it."""

    target: TokenBytes
    own: TokenBytes
    level: Level
    why: str

    @classmethod
    def between(
        cls, target: Tokenizer, own: Tokenizer, wanted: Literal["auto", "shared", "text"] = "auto"
    ) -> Bridge:
        """Return the bridge at the wanted level; `auto` takes the first level that fits."""
        sides = TokenBytes(target), TokenBytes(own)
        if wanted == "auto" and Vocabulary.of(target).difference(Vocabulary.of(own)) is None:
            return cls(*sides, "same", "the same tokens: a plain draft model")
        common, alike = share_of_vocabulary(*sides), share_cut_alike(*sides)
        fits = common >= _MIN_COMMON and alike >= _MIN_CUT_ALIKE
        level: Level = ("shared" if fits else "text") if wanted == "auto" else wanted
        how = "drafts over them" if level == "shared" else "drafts text"
        why = f"{common:.0%} of the tokens in common, {alike:.0%} of text cut alike: {how}"
        return cls(*sides, level, why)

    def identity(self) -> dict[str, object]:
        """Return the bridge's part of a drafter's identity."""
        own = Vocabulary.of(self.own.tokenizer).hash()
        return {"kind": KIND, "level": self.level, "vocabulary": own}


@dataclass(slots=True)
class _Translated:
    """A row's text in the drafter's own ids."""

    ids: list[int] = field(default_factory=list)
    num_read: int = 0  # leading tokens of the row that were translated


class SharedTokens(DraftModel):
    """A drafter of the tokens that both tokenizers have, in the target's ids.

    Its distribution is renormalised over them before warping, so drafts are sampled and judged by the
    same distribution. The drafter reads a token that only the target has as several tokens of its own.
    """

    kind = KIND
    needs = Needs()
    shares_ids = False

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
        self._readings = TokenTranslation(bridge.target, bridge.own, pairs)
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

    def _own_text(
        self, prompt: Sequence[int], output: Sequence[int]
    ) -> tuple[Sequence[int], np.ndarray]:
        own, counts = self._translate([*prompt, *output], [])
        return own, np.array(counts[len(prompt) - 1 :])

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

    def _over_target(self, logits: Tensor) -> Tensor:
        found = logits.new_full((len(logits), self._num_logits), float("-inf"))
        found[:, self._target_ids] = logits[:, self._own_ids]
        return found


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
    """A greedy drafter in its own tokens; the target's tokenizer reads the text of the draft.

    The draft is a function of the text, so it is judged exactly under every sampling method. The
    drafter holds a plain draft model of the re-encoded text, whose cache is kept for the tokens that did
    not change.
    """

    kind = KIND

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

    def trained_on(self) -> TrainedOn | None:
        return self.model.trained_on

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
        # a draft needs at least one token that the drafter can read
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
        tokens = self._bridge.target.encode_after(text.text, rest) if rest else []
        if tokens is None:
            return []
        return tokens if last is None else [*tokens, last]

    def price(self, costs: CostTable) -> None:
        self._inside.price(costs)

    @contextmanager
    def at_full_length(self) -> Iterator[None]:
        with self._inside.at_full_length():
            yield

    def identity(self) -> dict[str, object]:
        return {**self._inside.identity(), **self._bridge.identity()}

    def num_bytes(self) -> int:
        return self._inside.num_bytes()

    def bound_cache(self, max_positions: int | None, exact_fit: bool) -> None:
        self._inside.bound_cache(max_positions, exact_fit)

    def state_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes, as if rows had as many ids of the drafter as of the target."""
        return self._inside.state_bytes(lengths)
