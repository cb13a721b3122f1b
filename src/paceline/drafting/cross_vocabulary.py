"""A draft model whose tokenizer is not the target's.

Three levels, of which `build` takes the first that fits: the same ids, then it is a plain draft model;
tokens in common, then it drafts in the target's ids from its distribution over what both have
(token-level intersection, arXiv 2502.05202); text, then its greedy draft is written out and read again
by the target's tokenizer (string-level exact match, same paper). What does not come out even between
the tokenizers costs acceptance, never text. Symbols as in `draft_model`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np
import torch

from paceline.contracts import GREEDY, Drafts
from paceline.drafting.base import Drafter, Foresight, Needs, pad_drafts
from paceline.drafting.draft_model import DraftModel, DraftModelSettings
from paceline.drafting.foresight import SimulatedForesight
from paceline.drafting.stops import StopSettings
from paceline.errors import ConfigError, VocabularyError
from paceline.models.loading import load_language_model, load_tokenizer
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
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.costs.table import CostTable
    from paceline.drafting.base import Surroundings
    from paceline.models.language_model import LanguageModel
    from paceline.models.vocabulary import Tokenizer

Level = Literal["same", "shared", "text"]

# Below these shares a drafter over common tokens would read text cut as it never saw, or could not
# say most of what it would.
_ALIKE: Final = 0.8
_COMMON: Final = 0.5


class CrossVocabularySettings(DraftModelSettings):
    """A model with its own tokenizer. level: how the two are bridged; `auto` looks at both."""

    level: Literal["auto", "shared", "text"] = "auto"


@dataclass(frozen=True, slots=True)
class Bridge:
    """Two tokenizers side by side and the level at which a drafter can serve."""

    target: TokenBytes
    own: TokenBytes
    level: Level
    why: str

    @classmethod
    def between(
        cls, target: Tokenizer, own: Tokenizer, wanted: Literal["auto", "shared", "text"] = "auto"
    ) -> Bridge:
        sides = TokenBytes(target), TokenBytes(own)
        if wanted == "auto" and Vocabulary.of(target).difference(Vocabulary.of(own)) is None:
            return cls(*sides, "same", "the same tokens: a plain draft model")
        common, alike = share_of_vocabulary(*sides), share_cut_alike(*sides)
        level: Level = "shared" if common >= _COMMON and alike >= _ALIKE else "text"
        level = level if wanted == "auto" else wanted
        how = "drafts over them" if level == "shared" else "drafts text"
        why = f"{common:.0%} of the tokens in common, {alike:.0%} of text cut alike: {how}"
        return cls(*sides, level, why)


class CrossVocabulary(Drafter):
    """A draft model with another tokenizer than the target's.

    What this builds is one of the two classes below, or a plain `DraftModel`.
    """

    kind: ClassVar[str] = "cross_vocabulary"
    Settings: ClassVar[type[CrossVocabularySettings]] = CrossVocabularySettings

    @classmethod
    def build(cls, name: str, settings: CrossVocabularySettings, around: Surroundings) -> Drafter:
        bridge = check_bridge(name, settings, around.tokenizer, load_tokenizer(settings))
        return cls.beside(name, load_language_model(settings, name), settings, bridge, around)

    @classmethod
    def beside(
        cls,
        name: str,
        model: LanguageModel,
        settings: StopSettings,
        bridge: Bridge,
        around: Surroundings,
    ) -> Drafter:
        """The drafter of a model already loaded, beside its target."""
        drafter: Drafter
        if bridge.level == "same":
            length = settings.num_draft_tokens
            drafter = DraftModel.beside(name, model, length, around, settings)
        elif bridge.level == "shared":
            drafter = SharedTokens(name, model, settings, bridge, around)
        else:
            drafter = ThroughText(name, model, settings, bridge, around)
        drafter.note = f"drafter '{name}': {bridge.why}"
        return drafter


def check_bridge(
    name: str, settings: CrossVocabularySettings, target: Tokenizer, own: Tokenizer
) -> Bridge:
    """The bridge a drafter of these settings uses; an error if it cannot. Reads no weights."""
    bridge = Bridge.between(target, own, settings.level)
    if bridge.level == "shared" and not shared_tokens(bridge.target, bridge.own):
        raise VocabularyError(
            f"drafter '{name}' has no token in common with the target; set 'level: text'"
        )
    if bridge.level == "text" and settings.stop == "expected":
        raise ConfigError(
            f"drafter '{name}' drafts text ({bridge.why}), where 'stop: expected' has no "
            "confidences by target token to go by; set 'stop: confidence' or 'fixed'"
        )
    return bridge


def _identity(bridge: Bridge) -> dict[str, object]:
    own = Vocabulary.of(bridge.own.tokenizer).hash()
    return {"kind": CrossVocabulary.kind, "level": bridge.level, "vocabulary": own}


class SharedTokens(DraftModel):
    """Drafts over the tokens both have, in the target's ids.

    Its distribution is renormalised over them before it is warped, so it is the one that is sampled
    and the one that is judged. Tokens of the text that it lacks are read in pieces of its own.
    """

    kind: ClassVar[str] = CrossVocabulary.kind
    needs: ClassVar[Needs] = Needs()
    shares_ids: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        model: LanguageModel,
        settings: StopSettings,
        bridge: Bridge,
        around: Surroundings,
    ) -> None:
        width = around.target.num_logits
        super().__init__(
            name,
            model,
            settings.num_draft_tokens,
            num_tokens=width,
            num_logits=width,
            prefill_chunk=around.prefill_chunk,
            stop=settings,
        )
        self._bridge = bridge
        pairs = shared_tokens(bridge.target, bridge.own)
        self._readings = TokenTranslation(bridge.target, bridge.own, pairs)
        # a tokenizer may know more ids than its model has logits
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
        return {**super().identity(), **_identity(self._bridge)}

    def _text(self, row: RowView) -> Sequence[int]:
        text = self._texts[row.id]
        own, _ = self._translate(row.tokens[text.num_read :], text.ids)
        text.num_read = len(row.tokens)
        return own

    def _own(self, token: int) -> int:
        return self._pairs[token]

    def _read(self, tokens: Sequence[int]) -> tuple[Sequence[int], np.ndarray]:
        own, counts = self._translate(tokens, [])
        return own, np.array(counts)

    def _translate(self, tokens: Sequence[int], own: list[int]) -> tuple[list[int], list[int]]:
        """(`own` and the readings of the tokens behind it, its length by the end of each)."""
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


@dataclass(slots=True)
class _Translated:
    ids: list[int] = field(default_factory=list)
    num_read: int = 0


@dataclass(slots=True)
class _OwnRow:
    """A row as the drafter's own tokenizer reads it, for the draft model inside."""

    id: int
    num_prompt: int
    text: RunningText
    tokens: list[int] = field(default_factory=list)
    sampling: SamplingParams = GREEDY
    slot: int = -1
    hidden: Tensor | None = None

    def catch_up(self, tokens: Sequence[int]) -> int:
        """Read the target's tokens; how many of the own ids are as they were."""
        before, same = self.tokens, self.text.num_closed
        self.tokens = self.text.extend(tokens)
        while same < min(len(before), len(self.tokens)) and before[same] == self.tokens[same]:
            same += 1
        return same


class ThroughText(Drafter):
    """Drafts greedily in its own tokens; the text of the draft becomes the target's tokens.

    The draft is a function of the text, so it is judged exactly however the row is sampled. Inside
    is a plain draft model over the re-encoded text, whose cache is kept as far as that stays the same.
    """

    kind: ClassVar[str] = CrossVocabulary.kind
    needs: ClassVar[Needs] = Needs()

    def __init__(
        self,
        name: str,
        model: LanguageModel,
        settings: StopSettings,
        bridge: Bridge,
        around: Surroundings,
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
            prefill_chunk=around.prefill_chunk,
            stop=settings,
        )
        self._specials = special_pairs(bridge.target, bridge.own)
        self._said = {own: token for token, own in self._specials.items()}
        self._rows: dict[int, _OwnRow] = {}

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            text = RunningText(self._bridge.target, self._bridge.own, self._specials)
            self._rows[row.id] = _OwnRow(row.id, row.num_prompt, text)
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
        # a text of which nothing can be read leaves nothing to go on from
        limits = [n if own.tokens else 0 for n, own in zip(limits, own_rows, strict=True)]
        drafted = self._inside.propose(own_rows, limits)
        drafts = []
        for i, own in enumerate(own_rows):
            ids = drafted.tokens[i, : drafted.lengths[i]].tolist()
            drafts.append(self._said_by_target(own.text, ids)[: max(0, limits[i])])
        most = self.num_draft_tokens
        return Drafts(*pad_drafts([d[:most] for d in drafts], torch.device("cpu")))

    def _said_by_target(self, text: RunningText, ids: Sequence[int]) -> list[int]:
        """The target's tokens for the own ids that were drafted behind a text."""
        own = self._bridge.own
        end = next((k for k, i in enumerate(ids) if i in own.special), len(ids))
        drafted = own.join(ids[:end])
        last = self._said.get(ids[end]) if end < len(ids) else None
        if last is None:
            drafted, _ = split_incomplete(drafted)
        if not drafted.startswith(text.held):
            return []
        rest = drafted[len(text.held) :]
        tokens = self._bridge.target.encode_after(text.text, rest) if rest else []
        if tokens is None:
            return []
        return tokens if last is None else [*tokens, last]

    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> Foresight:
        return SimulatedForesight(self, prompt, trajectory, sampling=sampling)

    def price(self, costs: CostTable) -> None:
        self._inside.price(costs)

    def at_full_length(self) -> AbstractContextManager[None]:
        return self._inside.at_full_length()

    def identity(self) -> dict[str, object]:
        return {**self._inside.identity(), **_identity(self._bridge)}

    def num_bytes(self) -> int:
        return self._inside.num_bytes()

    def bound_cache(self, max_positions: int | None, exact_fit: bool) -> None:
        self._inside.bound_cache(max_positions, exact_fit)

    def state_bytes(self, lengths: Sequence[int]) -> int:
        """As if its own ids were as many as the target's."""
        return self._inside.state_bytes(lengths)
