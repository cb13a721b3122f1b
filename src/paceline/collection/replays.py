"""Every drafter along every trajectory, and what draft models write on their own.

What is stored does not depend on costs. Drafters are completed one by one, so one that was added later
is replayed without decoding. Their closeness to the target's distributions needs one more pass of the
target over every text, so it is kept apart and made only where it is asked for.
Symbols: T output tokens, V the target's logits width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from paceline.collection.trajectories import lone_driver
from paceline.contracts import NONE, Request
from paceline.drafting.contract import blaming
from paceline.drafting.draft_model import DraftModel
from paceline.replay import max_output, replay, target_distributions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Pace, Parts
    from paceline.collection.workers import Tick
    from paceline.replay import Replay
    from paceline.store.layout import Trajectory

    Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ReplayTask:
    """Trajectories with the drafters that still are to be replayed on each."""

    work: Sequence[tuple[Trajectory, Sequence[str]]]

    def __len__(self) -> int:
        return len(self.work)

    def run(self, pace: Pace, tick: Tick) -> tuple[dict[str, Rows], dict[str, float]]:
        """(rows of replays by drafter, seconds spent)."""
        rows: dict[str, Rows] = defaultdict(list)
        seconds: dict[str, float] = defaultdict(float)
        for trajectory, drafters in self.work:
            for name in drafters:
                began = perf_counter()
                rows[name].append(_replay_row(trajectory.id, _replay(pace.parts, trajectory, name)))
                seconds[f"replay:{name}"] += perf_counter() - began
            tick(1)
        return dict(rows), dict(seconds)


def _replay(parts: Parts, row: Trajectory, name: str) -> Replay:
    num_prompt = len(row.prompt_tokens)
    limit = max_output(row.max_new_tokens, num_prompt, parts.target.context_length)
    drafter = parts.drafters[name]
    with blaming(name):
        return replay(drafter, row.prompt_tokens, row.output_tokens, limit, sampling=row.sampling)


def _replay_row(id: str, result: Replay) -> dict[str, Any]:
    kept, scores = result.record, result.scores
    return {
        "id": id,
        "everywhere": kept.everywhere,
        "drafted": kept.table[:, 0],
        "accepted": kept.table[:, 1],
        "match": scores.match if scores else [],
        "confidence": scores.confidence if scores else [],
    }


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Trajectories with the chain drafters whose closeness to the target is still to be scored."""

    work: Sequence[tuple[Trajectory, Sequence[str]]]

    def __len__(self) -> int:
        return len(self.work)

    def run(self, pace: Pace, tick: Tick) -> tuple[dict[str, Rows], dict[str, float]]:
        """(rows of scores by drafter, seconds spent); all drafters share the target's pass."""
        rows: dict[str, Rows] = defaultdict(list)
        parts = pace.parts
        began = perf_counter()
        for row, drafters in self.work:
            chunk = parts.config.engine.prefill_chunk
            text = row.prompt_tokens, row.output_tokens
            p = target_distributions(parts.target, *text, chunk, row.sampling)  # [T, V]
            for name in drafters:
                with blaming(name), torch.inference_mode():
                    replay = parts.drafters[name].would_accept(*text, p, row.sampling)
                    replay.close()
                scores = replay.scores
                found = {"ratio": scores.ratio, "overlap": scores.overlap} if scores else {}
                rows[name].append({"id": row.id, "ratio": [], "overlap": [], **found})
            tick(1)
        return dict(rows), {"scores": perf_counter() - began}


def writers(parts: Parts) -> list[str]:
    """Drafters that write a text of their own in the target's tokens."""
    return [
        name
        for name, drafter in parts.drafters.items()
        if isinstance(drafter, DraftModel) and drafter.needs.same_vocabulary
    ]


@dataclass(frozen=True, slots=True)
class OutputTask:
    """Prompts that a draft model is to answer itself."""

    writer: str
    prompts: Sequence[Trajectory]

    def __len__(self) -> int:
        return len(self.prompts)

    def run(self, pace: Pace, tick: Tick) -> Rows:
        """Rows of outputs: greedy, under the target's limits and stops; nothing where the prompt exceeds
        the model's context.
        """
        drafter = pace.parts.drafters[self.writer]
        assert isinstance(drafter, DraftModel)
        stops = pace.stop_token_ids()
        requests = [
            Request(
                p.prompt_id, p.prompt_tokens, p.max_new_tokens, stop_token_ids=stops, drafter=NONE
            )
            for p in self.prompts
            if len(p.prompt_tokens) <= drafter.model.context_length
        ]
        outputs: dict[str, list[int]] = {p.prompt_id: [] for p in self.prompts}
        driver = lone_driver(pace.parts, drafter.model)
        outputs.update({c.request_id: c.token_ids for c in driver.generate(requests)})
        tick(len(self.prompts))
        return [{"id": id, "output_tokens": tokens} for id, tokens in outputs.items()]


def is_chain(parts: Parts, name: str) -> bool:
    """Whether a drafter has a distribution at every place of a text, to compare with the target's."""
    return isinstance(parts.drafters[name], DraftModel)
