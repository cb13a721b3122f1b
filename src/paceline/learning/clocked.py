"""Logged requests as a dataset: of each only the arm that served it is known, by the clock.

The reward `clocked` is the price of decoding the request plainly, with as many rows in flight, over
the seconds it took. All other arms' rewards are not numbers; `linucb` and `thompson` learn from
that. Knows no file. Symbols: N requests, A arms, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.contracts import NONE
from paceline.errors import StoreError
from paceline.learning.dataset import Dataset, spans_of
from paceline.learning.rounds import RoundTable
from paceline.rewards import clocked_speed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.costs import CostTable, Objective


@dataclass(frozen=True, slots=True)
class ClockedRequest:
    """One request as it was served."""

    id: str
    arm: str
    features: np.ndarray  # [F]
    num_prompt: int
    num_tokens: int  # emitted
    rows: int  # in flight when the arm was chosen
    seconds: float  # from admission to the last token


def clocked_dataset(
    requests: Sequence[ClockedRequest],
    arms: Sequence[str],
    costs: CostTable,
    objective: Objective = "latency",
) -> Dataset:
    """Learn from it with the reward `clocked`. Raises StoreError where there is nothing to learn.

    Requests served by other arms than `arms`, or of a single token, which no arm had a hand in, are
    left out.
    """
    kept = [r for r in requests if r.arm in arms and r.num_tokens > 1 and r.seconds > 0]
    if len({r.arm for r in kept}) < 2:
        served = ", ".join(sorted({r.arm for r in kept})) or "none of the arms"
        raise StoreError(
            f"{len(kept)} logged requests, all served by {served}: nothing can be compared; log "
            "with explore > 0"
        )
    N, A = len(kept), len(arms)
    rewards, seconds = np.full((2, N, A), np.nan)
    for i, r in enumerate(kept):
        place = list(arms).index(r.arm)
        seconds[i, place] = r.seconds
        rewards[i, place] = clocked_speed(
            costs.seconds, r.num_prompt, r.num_tokens, r.seconds, r.rows
        )
    features = np.stack([r.features for r in kept]).astype(np.float32)
    num_prompt = np.array([r.num_prompt for r in kept])
    num_tokens = np.array([r.num_tokens for r in kept])
    return Dataset(
        arms=tuple(arms),
        ids=tuple(r.id for r in kept),
        groups=tuple(r.id for r in kept),
        domains=("",) * N,
        prompts=((),) * N,
        features=features,
        num_prompt=num_prompt,
        num_tokens=num_tokens,
        limits=num_tokens,
        rounds_per_token=np.full((N, A), np.nan),
        drafted_per_token=np.full((N, A), np.nan),
        empty_per_token=np.full((N, A), np.nan),
        seconds=seconds,
        rewards=rewards,
        spans=spans_of(features.shape[1]),
        rounds=RoundTable((NONE,), num_prompt, ()),
        costs=costs,
        objective=objective,
    )
