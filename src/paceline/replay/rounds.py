"""The rounds a drafter would have had along a trajectory, without speculative decoding.

A round needs to know only how much was drafted and how much of it the target's own output repeats,
so the engine's bookkeeping is redone here on a recorded output, with its limits and its cuts. Holds
for greedy decoding where the text does not depend on the arm (float32). Knows no engine, no file.
Symbols: T trajectory tokens, V the target's logits width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.contracts import SamplingParams
from paceline.models.packing import Span
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.drafting.base import Drafter, Foresight, PositionScores
    from paceline.models.language_model import LanguageModel

_UNWARPED = SamplingParams(temperature=1.0, method="residual")


@dataclass(frozen=True, slots=True)
class Replay:
    """One arm on one trajectory."""

    rounds: np.ndarray  # [rounds, 2] int64: drafted, accepted
    scores: PositionScores | None  # of chain drafters


def max_output(max_new_tokens: int, num_prompt: int, context_length: int) -> int:
    """Tokens a request may emit: the last one is never fed, so it needs no position."""
    return min(max_new_tokens, context_length + 1 - num_prompt)


def simulate(foresight: Foresight, num_output: int, max_total_output: int) -> np.ndarray:
    """[rounds, 2] int64, drafted and accepted: the engine's rounds over `num_output` tokens.

    The prefill emits the first token. A round drafts at most what could still be emitted beside the
    target's own token. A draft that reaches past the trajectory's end (a stop) counts what was
    emitted of it, as in the engine.
    """
    rounds: list[tuple[int, int]] = []
    position = 1
    while position < num_output:
        drafted, accepted = foresight.accepted(position, max_total_output - position - 1)
        accepted = min(accepted, num_output - position)
        rounds.append((drafted, accepted))
        position += accepted + 1
    return np.array(rounds, dtype=np.int64).reshape(-1, 2)


def replay(
    drafter: Drafter,
    prompt: Sequence[int],
    trajectory: Sequence[int],
    max_total_output: int,
    p: Tensor | None = None,
) -> Replay:
    """Rounds and scores of one drafter. p: [T, V], see `target_distributions`."""
    with torch.inference_mode():
        foresight = drafter.would_accept(prompt, trajectory, p)
        try:
            rounds = simulate(foresight, len(trajectory), max_total_output)
        finally:
            foresight.close()
    return Replay(rounds, foresight.scores)


def target_distributions(
    target: LanguageModel, prompt: Sequence[int], trajectory: Sequence[int], chunk: int = 512
) -> Tensor:
    """p [T, V] float32: the target's distribution before each trajectory token, at temperature 1.

    One teacher-forced pass over the text, `chunk` tokens a forward.
    """
    text = torch.tensor([*prompt, *trajectory[:-1]])
    first = len(prompt) - 1  # the place that predicts the first output token
    parts: list[Tensor] = []
    slot = target.acquire()
    try:
        with torch.inference_mode():
            for start in range(0, len(text), chunk):
                piece = text[start : start + chunk]
                hidden = target.forward(piece, [Span(slot, start, len(piece))])
                if start + len(piece) > first:
                    logits = target.unembed(hidden[max(0, first - start) :])
                    parts.append(warp(logits, _UNWARPED).cpu())
    finally:
        target.release(slot)
    return torch.cat(parts)
