"""The target drafts for itself, with some of its attention and MLP sub-layers left out.

Draft & Verify, self-speculative decoding (arXiv 2309.08168). It has no weights and no cache of its own:
a draft reads the entries of full passes in the target's cache and writes its own after them, into the
row's slot from its last token on. Verification feeds the same tokens with all layers and overwrites
every such entry, so there is no prefill and nothing to catch up with. `drafting.draft_length` has the
rules of a draft's length, in order. Symbols: R rows, K draft length, V logits width, q the skipped
model's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS
from paceline.contracts import GREEDY, Drafts
from paceline.drafting.base import Drafter, Needs, pad_drafts
from paceline.drafting.draft_length import AdaptiveThreshold, ThresholdSettings
from paceline.drafting.draft_replay import CachedReplay, count_accepted
from paceline.drafting.drawing import draw, empty_probs
from paceline.drafting.skip_set import SkipSet
from paceline.errors import ConfigError
from paceline.models.packing import Span
from paceline.models.self_checks import check_sublayers
from paceline.models.sublayers import LayerSubset
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.drafting.base import BuildContext
    from paceline.drafting.draft_replay import DraftReplay
    from paceline.models.language_model import LanguageModel
    from paceline.models.vocabulary import Vocabulary
    from paceline.store.trained_on import TrainedOn


class LayerSkipSettings(ThresholdSettings):
    """The settings: sub-layers to leave out, as a file or as layer indices, and the stop rule.

    stop: `threshold` is the published adaptive exit; `fixed` drafts up to num_draft_tokens.
    """

    skip_set: Path | None = None
    skip_attention: tuple[int, ...] = ()
    skip_mlp: tuple[int, ...] = ()
    num_draft_tokens: int = Field(default=12, ge=1, le=MAX_DRAFT_TOKENS)
    stop: Literal["threshold", "fixed"] = "threshold"

    @model_validator(mode="after")
    def _one_source(self) -> LayerSkipSettings:
        inline = bool(self.skip_attention or self.skip_mlp)
        if inline == (self.skip_set is not None):
            raise ValueError(
                "say what to skip: skip_set with a file of `paceline layer-search PROMPTS`, or "
                "skip_attention and skip_mlp with layer indices"
            )
        return self


@dataclass(slots=True)
class _RowState:
    """A row's threshold and its last draft."""

    exit: AdaptiveThreshold
    num_tokens: int = 0  # of the row at its last draft
    draft: list[int] = field(default_factory=list)
    reached_limit: bool = False

    def learn(self, tokens: Sequence[int]) -> None:
        """Adapt the threshold to the accepted tokens of the last draft."""
        written = tokens[self.num_tokens :]
        accepted = count_accepted(self.draft, None, written)
        # text that agrees up to its end: the engine has cut the draft, and the rest was not tried
        drafted = accepted if accepted == len(written) else len(self.draft)
        self.exit.update(drafted, accepted, self.reached_limit)
        self.draft = []


class LayerSkip(Drafter):
    kind = "layer_skip"
    replays_everywhere = False  # a draft costs most of a forward of the target
    Settings = LayerSkipSettings
    needs = Needs(target_weights=True)

    def __init__(
        self,
        name: str,
        target: LanguageModel,
        subset: LayerSubset,
        settings: LayerSkipSettings,
        prefill_chunk: int = 512,
    ) -> None:
        """subset: the sub-layers to leave out, instead of those in the settings."""
        super().__init__(name, settings.num_draft_tokens)
        self.subset = subset
        self.settings = settings
        self._target = target
        self._chunk = prefill_chunk
        self._states: dict[int, _RowState] = {}
        self.stops_early = settings.stop == "threshold"

    @classmethod
    def check(cls, name: str, settings: LayerSkipSettings, vocabulary: Vocabulary) -> None:
        if settings.skip_set is not None:
            SkipSet.load(settings.skip_set)

    @classmethod
    def build(cls, name: str, settings: LayerSkipSettings, context: BuildContext) -> LayerSkip:
        """Build the drafter. Raises ModelError if the target's sub-layers cannot be skipped."""
        subset = subset_of(name, settings, context.target)
        check_sublayers(context.target)
        return cls(name, context.target, subset, settings, context.prefill_chunk)

    def identity(self) -> dict[str, object]:
        rule: dict[str, object] = {"stop": self.settings.stop}
        if self.settings.stop == "threshold":
            rule |= self.settings.model_dump(include=set(ThresholdSettings.model_fields))
        return {
            **super().identity(),
            "skip_attention": _as_text(self.subset.attention),
            "skip_mlp": _as_text(self.subset.mlp),
            **rule,
        }

    def trained_on(self) -> TrainedOn | None:
        return NOTHING if self.settings.skip_set is None else None

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states[row.id] = _RowState(AdaptiveThreshold.of(self.settings))

    def finish(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._states.pop(row.id, None)

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        longest = [max(0, min(limit, self.num_draft_tokens)) for limit in limits]
        states = [self._states[row.id] for row in rows]
        for row, state in zip(rows, states, strict=True):
            state.learn(row.tokens)
        drafts: list[list[int]] = [[] for _ in rows]
        probs = empty_probs(rows, max(longest), self._target.num_logits, self._target.device)
        # rows sorted by slot make one attention call
        active = sorted((i for i, n in enumerate(longest) if n), key=lambda i: rows[i].slot)
        for step in range(max(longest)):
            members = [rows[i] for i in active]
            logits = self._forward(members, [drafts[i] for i in active])
            drawn = draw(members, logits, step, probs, active)
            for i, token in zip(active, drawn, strict=True):
                drafts[i].append(token)
            active = [
                i
                for i, confidence in zip(active, self._confidences(logits), strict=True)
                if len(drafts[i]) < longest[i] and not states[i].exit.ends(confidence)
            ]
            if not active:
                break
        for row, state, draft, n in zip(rows, states, drafts, longest, strict=True):
            state.num_tokens, state.draft = len(row.tokens), draft
            state.reached_limit = len(draft) == n
        tokens, lengths = pad_drafts(drafts, torch.device("cpu"))
        return Drafts(tokens, lengths, None if probs is None else probs[:, : tokens.shape[1]])

    def _forward(self, rows: Sequence[RowView], drafts: Sequence[Sequence[int]]) -> Tensor:
        """Return logits [R, V] after each row's draft so far, by feeding its last token."""
        fed = [
            draft[-1] if draft else row.tokens[-1] for row, draft in zip(rows, drafts, strict=True)
        ]
        spans = [
            Span(row.slot, row.num_cached + len(draft), 1)
            for row, draft in zip(rows, drafts, strict=True)
        ]
        return self._target.logits_after(fed, spans, skip=self.subset)

    def _confidences(self, logits: Tensor) -> list[float]:
        """Return max q of each row before any warping, [R]; 1 if no rule ends drafts early."""
        if not self.stops_early:
            return [1.0] * len(logits)
        logits = logits.float()
        largest: list[float] = (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp().tolist()
        return largest

    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> DraftReplay:
        return CachedReplay(self, self._target, prompt, trajectory, self._chunk, sampling)


def subset_of(name: str, settings: LayerSkipSettings, target: LanguageModel) -> LayerSubset:
    """Return the sub-layers of this target that the settings leave out.

    Raises ConfigError for a layer that the target does not have, ArtefactError for a skip set that is
    damaged or was made for another target.
    """
    if settings.skip_set is not None:
        skip_set = SkipSet.load(settings.skip_set)
        skip_set.check(target, f"drafter '{name}'")
        subset = skip_set.subset
    else:
        subset = LayerSubset(frozenset(settings.skip_attention), frozenset(settings.skip_mlp))
    beyond = [i for i in subset.attention | subset.mlp if not 0 <= i < target.num_layers]
    if beyond:
        raise ConfigError(
            f"drafter '{name}': there is no layer {beyond[0]} to skip; the target's layers are "
            f"0 to {target.num_layers - 1}"
        )
    return subset


def _as_text(indices: frozenset[int]) -> str:
    return " ".join(map(str, sorted(indices)))
