"""What a skipped model would have had accepted on the target's own outputs, in one forward.

The outputs' full-model entries stay in the target's cache. A subset is tried on all of them at once:
every output is cut into windows as long as a draft, and each window reads full entries before it and
writes the skipped model's own within it, as a draft that begins there would. Windows of one row go
into the forward last first, so none reads what another wrote. Knows no costs.
Symbols: T output tokens, K draft length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.contracts import NONE, Request
from paceline.drafting.base import Foresight
from paceline.drafting.draft_exit import DraftExit
from paceline.drafting.foresight import cache_text
from paceline.models.packing import Span
from paceline.replay import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.assembly import Pace
    from paceline.layer_search.settings import SearchSettings
    from paceline.models.language_model import LanguageModel
    from paceline.models.sublayers import LayerSubset

_UNEMBEDDED = 64  # rows at once: logits of all of them could be large


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A development prompt and the target's greedy output."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


def decode(pace: Pace, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Trajectory]:
    """The target's own outputs, of which those too short for a round are left out."""
    stops = pace.stop_token_ids()
    requests = [
        Request(str(i), tuple(prompt), max_new_tokens, stop_token_ids=stops, drafter=NONE)
        for i, prompt in enumerate(prompts)
    ]
    done = {int(c.request_id): c.token_ids for c in pace.stream(requests)}
    found = [Trajectory(tuple(prompt), tuple(done[i])) for i, prompt in enumerate(prompts)]
    return [trajectory for trajectory in found if len(trajectory.output) > 2]


@dataclass(frozen=True, slots=True)
class Judgement:
    """A skipped model on one output: is its likeliest token the output's, and how sure was it."""

    match: np.ndarray  # [T - 1] bool, of output tokens 1 to T - 1
    confidence: np.ndarray  # [T - 1] float32


class Development:
    """Outputs in the target's cache, on which subsets are tried; `close` gives the cache back."""

    def __init__(
        self, target: LanguageModel, trajectories: Sequence[Trajectory], window: int
    ) -> None:
        """window: the most tokens of a draft."""
        self._target = target
        self.trajectories = list(trajectories)
        self._slots = [target.acquire() for _ in trajectories]
        self._full: list[list[Tensor]] = []  # each output's entries, as full passes left them
        self._fed: list[int] = []
        self._spans: list[Span] = []
        self._truth: list[int] = []
        with torch.inference_mode():
            for slot, t in zip(self._slots, trajectories, strict=True):
                text = [*t.prompt, *t.output[:-1]]
                cache_text(target, slot, text, len(t.prompt))
                self._full.append(target.cache.read(slot, len(t.prompt), len(text)))
                for start in reversed(range(len(t.prompt), len(text), window)):
                    width = min(window, len(text) - start)
                    self._spans.append(Span(slot, start, width))
                    self._fed += text[start : start + width]
                    place = start - len(t.prompt)
                    self._truth += t.output[place + 1 : place + 1 + width]

    def judge(self, subset: LayerSubset) -> list[Judgement]:
        """Try a subset on every output."""
        target = self._target
        with torch.inference_mode():
            hidden = self._hidden(subset)
            best, sure = _summary(target, hidden)
            for slot, t, entries in zip(self._slots, self.trajectories, self._full, strict=True):
                target.cache.write(slot, len(t.prompt), entries)
        match = best == np.array(self._truth)
        by_slot = {
            slot: Judgement(
                np.zeros(len(t.output) - 1, bool), np.zeros(len(t.output) - 1, np.float32)
            )
            for slot, t in zip(self._slots, self.trajectories, strict=True)
        }
        begins = {s: len(t.prompt) for s, t in zip(self._slots, self.trajectories, strict=True)}
        first = 0
        for span in self._spans:
            place = span.start - begins[span.slot]
            there, here = slice(place, place + span.width), slice(first, first + span.width)
            by_slot[span.slot].match[there] = match[here]
            by_slot[span.slot].confidence[there] = sure[here]
            first += span.width
        return [by_slot[slot] for slot in self._slots]

    def _hidden(self, subset: LayerSubset) -> Tensor:
        """[N, D] of all windows without the subset."""
        tokens = torch.tensor(self._fed)
        if not self._target.cache.stores_all_first:
            return self._target.forward(tokens, self._spans, skip=subset)
        # a paged forward caches all its tokens before any of them attends, so here the windows of one
        # row take turns
        pieces = torch.split(tokens, [span.width for span in self._spans])
        turns: dict[int, list[int]] = {}
        seen: dict[int, int] = {}
        for i, span in enumerate(self._spans):
            turn = seen[span.slot] = seen.get(span.slot, -1) + 1
            turns.setdefault(turn, []).append(i)
        found: dict[int, Tensor] = {}
        for members in turns.values():
            spans = [self._spans[i] for i in members]
            hidden = self._target.forward(
                torch.cat([pieces[i] for i in members]), spans, skip=subset
            )
            parts = torch.split(hidden, [span.width for span in spans])
            found |= zip(members, parts, strict=True)
        return torch.cat([found[i] for i in range(len(pieces))])

    def close(self) -> None:
        for slot in self._slots:
            self._target.release(slot)
        self._slots = []


def _summary(target: LanguageModel, hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest token [N] and its probability [N]."""
    best, sure = [], []
    for part in torch.split(hidden, _UNEMBEDDED):
        logits = target.unembed(part).float()
        top, ids = logits.max(dim=-1)
        best.append(ids.cpu())
        sure.append((top - logits.logsumexp(dim=-1)).exp().cpu())
    return torch.cat(best).numpy(), torch.cat(sure).numpy()


class _Read(Foresight):
    """Rounds read off a judgement: a draft survives as long as it matches."""

    def __init__(self, judgement: Judgement, settings: SearchSettings) -> None:
        self._match = judgement.match.tolist()
        self._confidence = judgement.confidence.tolist()
        self._most = settings.num_draft_tokens
        self._exit = DraftExit.of(settings) if settings.stop == "threshold" else None

    def accepted(self, position: int, limit: int) -> tuple[int, int]:
        most = max(0, min(limit, self._most))
        drafted = accepted = 0
        for place in range(position - 1, position - 1 + most):
            drafted += 1
            # what follows the first wrong token is a draft of another text; its confidence is
            # taken to be that on the right one
            if accepted == drafted - 1 and self._match[place]:
                accepted += 1
            if self._exit is not None and self._exit.ends(self._confidence[place]):
                break
        if self._exit is not None:
            self._exit.update(drafted, accepted, drafted == most)
        return drafted, accepted


def rounds_of(
    judgements: Sequence[Judgement], trajectories: Sequence[Trajectory], settings: SearchSettings
) -> list[np.ndarray]:
    """[rounds, 2] drafted and accepted, for each output, as the engine would have had them."""
    return [
        simulate(_Read(judgement, settings), len(t.output), len(t.output))
        for judgement, t in zip(judgements, trajectories, strict=True)
    ]
