"""Collect, price, learn: from a configuration and prompts to a target with a learned policy.

The same path that `paceline collect`, `profile` and `learn` walk one verb at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from paceline.assembly import Pace, build, policy_identity
from paceline.bench.profile import profile
from paceline.collection import collect
from paceline.learning import learn
from paceline.store.collection import load_collection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from paceline.config import Config
    from paceline.contracts import PromptRecord
    from paceline.costs.table import CostTable
    from paceline.learning import LearningResult

    OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything the pipeline made; `pace` chooses with the learned policy."""

    pace: Pace
    costs: CostTable
    learned: LearningResult
    seconds: dict[str, float]  # wall clock by stage


def prepare(
    config: Config,
    prompts: Sequence[PromptRecord],
    folder: Path,
    max_new_tokens: int,
    on_progress: OnProgress,
) -> Prepared:
    """Run all stages, writing into `folder`: collection/, costs.json, policy/."""
    seconds: dict[str, float] = {}
    began = perf_counter()

    def stage(name: str) -> None:
        nonlocal began
        seconds[name] = perf_counter() - began
        began = perf_counter()

    parts = build(config)
    pace = Pace(parts)
    stage("load")
    collect(pace, prompts, folder / "collection", max_new_tokens, on_progress=on_progress)
    stage("collect")
    costs = profile(parts, on_progress=on_progress)
    costs.save(folder / "costs.json")
    stage("profile")
    learned = learn(
        load_collection(folder / "collection", list(parts.drafters)),
        costs,
        policy_identity(parts),
        config.learning,
        on_progress=on_progress,
    )
    learned.save(folder / "policy")
    stage("learn")
    return Prepared(Pace(parts, learned.policy.choose), costs, learned, seconds)
