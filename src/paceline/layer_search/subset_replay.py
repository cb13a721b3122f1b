"""Replay of a target that leaves sub-layers out, on its own full outputs, in one forward per subset.

The cache entries of the full model stay in the target's cache. A subset is tried on all outputs at
once. Every output is cut into windows as long as a draft. Each window reads full entries before it
and writes the smaller model's own entries within it, as a draft that begins there would. The last
window of a row comes first in the forward, so no window reads what another wrote. Knows no costs.
Symbols: T output tokens, N tokens of all windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.contracts import NONE, Request
from paceline.drafting.chain_replay import ChainReplay
from paceline.drafting.draft_length import AdaptiveThreshold
from paceline.drafting.draft_replay import PositionScores, cache_text
from paceline.models.packing import Span
from paceline.replay import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.assembly import Pace
    from paceline.layer_search.settings import SearchSettings
    from paceline.models.language_model import LanguageModel
    from paceline.models.sublayers import LayerSubset

_UNEMBEDDED = 64  # rows at once: the logits of all rows could be large


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A development prompt and the target's greedy output."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


def decode(pace: Pace, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Trajectory]:
    """Return the target's own outputs, without those that are too short for a round."""
    stops = pace.stop_token_ids()
    requests = [
        Request(str(i), tuple(prompt), max_new_tokens, stop_token_ids=stops, drafter=NONE)
        for i, prompt in enumerate(prompts)
    ]
    outputs = {int(c.request_id): c.token_ids for c in pace.stream(requests)}
    trajectories = [Trajectory(tuple(p), tuple(outputs[i])) for i, p in enumerate(prompts)]
    return [trajectory for trajectory in trajectories if len(trajectory.output) > 2]


class SubsetReplay:
    """Outputs in the target's cache, on which subsets are tried; `close` frees the cache."""

    def __init__(
        self, target: LanguageModel, trajectories: Sequence[Trajectory], window: int
    ) -> None:
        """window: the longest draft."""
        self.trajectories = list(trajectories)
        self._target = target
        self._slots = [target.acquire() for _ in trajectories]
        self._entries: list[list[Tensor]] = []  # of each output, as full forwards wrote them
        # a paged forward writes all its tokens before any of them attends, so there the windows of
        # one row go into forwards of their own
        is_paged = target.cache.stores_all_first
        forwards: dict[int, list[tuple[Span, list[int], int]]] = {}
        first = 0
        with torch.inference_mode():
            for slot, t in zip(self._slots, trajectories, strict=True):
                tokens = [*t.prompt, *t.output[:-1]]
                cache_text(target, slot, tokens, len(t.prompt))
                text = target.text_of(tokens, len(t.prompt))
                before = target.num_before_output(len(t.prompt))
                self._entries.append(target.cache.read(slot, before, len(text)))
                starts = range(before, len(text), window)
                for turn, start in enumerate(reversed(starts)):
                    fed = list(text[start : start + window])
                    predicted = first + start - before + 1
                    forward = forwards.setdefault(turn if is_paged else 0, [])
                    forward.append((Span(slot, start, len(fed)), fed, predicted))
                first += len(t.output)
        windows = [one for own in forwards.values() for one in own]
        self._forwards = [
            (torch.tensor([t for _, fed, _ in own for t in fed]), [span for span, _, _ in own])
            for own in forwards.values()
        ]
        # [N] of the predicted tokens, in all outputs laid end to end
        self._places = np.concatenate([i + np.arange(len(fed)) for _, fed, i in windows])

    def scores(self, subset: LayerSubset) -> list[PositionScores]:
        """Return for each output, at each position [T], whether the smaller model's likeliest token
        is the output's, and its probability. The first token is the full prefill's: right and sure.
        """
        target = self._target
        with torch.inference_mode():
            hidden = [target.forward(fed, spans, skip=subset) for fed, spans in self._forwards]
            best, probability = _likeliest(target, torch.cat(hidden))
            for slot, t, entries in zip(self._slots, self.trajectories, self._entries, strict=True):
                target.cache.write(slot, target.num_before_output(len(t.prompt)), entries)
        output = np.concatenate([t.output for t in self.trajectories])
        match, confidence = np.ones(len(output), bool), np.ones(len(output), np.float32)
        match[self._places] = best == output[self._places]
        confidence[self._places] = probability
        ends = np.cumsum([len(t.output) for t in self.trajectories])[:-1]
        unknown = np.split(np.full(len(output), np.nan, np.float32), ends)
        columns = np.split(match, ends), unknown, unknown, np.split(confidence, ends)
        return [PositionScores(*column) for column in zip(*columns, strict=True)]

    def close(self) -> None:
        for slot in self._slots:
            self._target.release(slot)
        self._slots = []


def _likeliest(target: LanguageModel, hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest tokens [N] and their probabilities [N]."""
    tokens, probabilities = [], []
    for part in torch.split(hidden, _UNEMBEDDED):
        logits = target.unembed(part).float()
        top, ids = logits.max(dim=-1)
        tokens.append(ids.cpu())
        probabilities.append((top - logits.logsumexp(dim=-1)).exp().cpu())
    return torch.cat(tokens).numpy(), torch.cat(probabilities).numpy()


class _ThresholdReplay(ChainReplay):
    """Rounds of a drafter with Draft & Verify's adaptive exit.

    The confidences along the text also stand for those after the first wrong token.
    """

    def __init__(self, scores: PositionScores, rooms: np.ndarray, settings: SearchSettings) -> None:
        super().__init__(scores, rooms, settings.num_draft_tokens, rule=self)
        self._exit = AdaptiveThreshold.of(settings)
        self._most = settings.num_draft_tokens

    def allows_next(self, confidences: Sequence[float], context: int) -> bool:
        return not self._exit.ends(confidences[-1])

    def round_at(self, position: int, limit: int) -> tuple[int, int]:
        drafted, accepted = super().round_at(position, limit)
        self._exit.update(drafted, accepted, drafted == min(limit, self._most))
        return drafted, accepted


def rounds_of(scores: Sequence[PositionScores], settings: SearchSettings) -> list[np.ndarray]:
    """Return the engine's rounds [rounds, 2], drafted and accepted, on each output."""
    rounds = []
    for own in scores:
        rooms = np.full(len(own.match), settings.num_draft_tokens)
        replay = (
            _ThresholdReplay(own, rooms, settings)
            if settings.stop == "threshold"
            else ChainReplay(own, rooms, settings.num_draft_tokens)
        )
        rounds.append(simulate(replay, len(own.match), len(own.match)))
    return rounds
