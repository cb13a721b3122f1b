"""Generated prompts and prices whose best arms are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from paceline.costs import CostTable, Measurement
from paceline.learning.dataset import Dataset, default_spans, drafters_of
from paceline.learning.rounds import RoundTable
from paceline.store.records import CollectedPrompt, ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HIDDEN = 384
NUM_STATISTICS = 6


class Clusters(NamedTuple):
    """Prompts in four clusters; in cluster c arm c + 1 is best, arm 0 is best nowhere."""

    features: np.ndarray  # [N, 2 * HIDDEN + NUM_STATISTICS] float32
    rewards: np.ndarray  # [N, 5]
    cluster: np.ndarray  # [N]


@pytest.fixture
def clusters() -> Callable[[int, int], tuple[Clusters, Clusters]]:
    """Draw (training prompts, 100 held-out prompts per cluster) from (seed, prompts per cluster)."""

    def make(seed: int, per_cluster: int = 30) -> tuple[Clusters, Clusters]:
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(4, 2 * HIDDEN)) * 0.3
        units = rng.uniform(0.1, 10.0, 2 * HIDDEN)  # features come in all sizes

        def draw(count: int) -> Clusters:
            cluster = np.repeat(np.arange(4), count)
            hidden = (centres[cluster] + rng.normal(size=(4 * count, 2 * HIDDEN))) * units
            statistics = rng.normal(size=(4 * count, NUM_STATISTICS))
            best = np.arange(5) == cluster[:, None] + 1
            rewards = 1.0 + 0.6 * best + 0.1 * rng.normal(size=(4 * count, 5))
            return Clusters(np.hstack([hidden, statistics]).astype(np.float32), rewards, cluster)

        return draw(per_cluster), draw(100)

    return make


@pytest.fixture
def cost_table() -> Callable[[Sequence[str]], CostTable]:
    """Build prices in which a round costs 1.5 s for the target and 0.5 s for a drafter."""

    def make(arms: Sequence[str]) -> CostTable:
        figures = [("target", "prefill", 2.0), ("target", "forward", 1.0), ("engine", "round", 0.5)]
        for arm in arms:
            figures += [(arm, "start", 0.25), (arm, "propose", 0.5)]
        return CostTable({}, [Measurement(s, o, 1, 0, 1, seconds) for s, o, seconds in figures])

    return make


@pytest.fixture
def collected() -> Callable[..., CollectedPrompt]:
    """Build a prompt with 41 output tokens. accepted: tokens per round that each arm got accepted."""

    def make(
        id: str, accepted: dict[str, int], features: np.ndarray, domain: str = "", **changes: Any
    ) -> CollectedPrompt:
        replays = {}
        for arm, kept in accepted.items():
            rounds = np.tile(np.array([[4, kept]]), (40 // (kept + 1), 1))
            replays[arm] = ReplayedDrafter(rounds, everywhere=False)
        values: dict[str, Any] = {
            "id": id,
            "domain": domain,
            "prompt_tokens": tuple(range(10)),
            "output_tokens": tuple(range(41)),
            "max_new_tokens": 41,
            "features": features.astype(np.float32),
            "replays": replays,
            "draft_outputs": {},
        }
        return CollectedPrompt(**values | changes)

    return make


@pytest.fixture
def tabled() -> Callable[..., Dataset]:
    """Build a dataset of given rewards or seconds, without rounds."""

    def make(arms: Sequence[str], features: np.ndarray, **changes: Any) -> Dataset:
        N, A = len(features), len(arms)
        values: dict[str, Any] = {
            "arms": tuple(arms),
            "ids": tuple(f"p{i}" for i in range(N)),
            "domains": ("",) * N,
            "prompts": ((1, 2, 3),) * N,
            "features": np.asarray(features, dtype=np.float32),
            "num_prompt": np.full(N, 3),
            "num_tokens": np.full(N, 100),
            "limits": np.full(N, 100),
            "rounds_per_token": np.ones((N, A)),
            "drafted_per_token": np.zeros((N, A)),
            "empty_per_token": np.ones((N, A)),
            "calls_per_token": np.zeros((N, A)),
            "proposed_per_token": np.zeros((N, A)),
            "composed": (),
            "seconds": np.ones((N, A)),
            "rewards": np.ones((N, A)),
            "trained": np.zeros((N, len(drafters_of(arms))), dtype=np.int8),
            "spans": default_spans(features.shape[1]),
            "rounds": RoundTable(tuple(arms), np.full(N, 3), ()),
            "costs": CostTable({}, []),
            "objective": "latency",
            "reward": "speed",
        } | changes
        return Dataset(groups=values.pop("groups", values["ids"]), **values)

    return make
