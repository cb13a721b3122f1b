"""Replay every drafter along every trajectory, and decode the draft models' own outputs.

Stored results do not depend on costs, and no drafter sees a collected answer to the prompt that it is
replayed on. Each drafter has its own store, so that one added later is
replayed without decoding. Scores against the target's distributions need one more pass of the target
over every text, so they have their own store and are computed only on request.
Symbols: T output tokens, V the target's logits width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from paceline.bench.cost_measurement import plain_driver
from paceline.contracts import NONE, Request
from paceline.drafting.contract import blaming
from paceline.drafting.draft_model import DraftModel
from paceline.replay import max_output, replay, target_distributions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Pace, Parts
    from paceline.collection.workers import OnDone
    from paceline.store.layout import Trajectory

    Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _DrafterTask:
    """Trajectories, each with the drafters that lack it."""

    work: Sequence[tuple[Trajectory, Sequence[str]]]

    def __len__(self) -> int:
        return len(self.work)


class ReplayTask(_DrafterTask):
    """Trajectories, each with the drafters that still have to be replayed on it."""

    def run(self, pace: Pace, on_done: OnDone) -> tuple[dict[str, Rows], dict[str, float]]:
        """Return (rows of replays by drafter, seconds by stage)."""
        rows: dict[str, Rows] = defaultdict(list)
        seconds: dict[str, float] = defaultdict(float)
        for trajectory, drafters in self.work:
            for name in drafters:
                began = perf_counter()
                rows[name].append(_replay_row(pace.parts, trajectory, name))
                seconds[f"replay:{name}"] += perf_counter() - began
            on_done(1)
        return dict(rows), dict(seconds)


def _replay_row(parts: Parts, row: Trajectory, name: str) -> dict[str, Any]:
    before = parts.target.num_before_output(len(row.prompt_tokens))
    limit = max_output(row.max_new_tokens, before, parts.target.context_length)
    text = row.prompt_tokens, row.output_tokens
    drafter = parts.drafters[name]
    with blaming(name), drafter.without_answers_to(row.prompt_id):
        result = replay(drafter, *text, limit, sampling=row.sampling)
    scores = result.scores
    return {
        "id": row.id,
        "everywhere": result.record.everywhere,
        "drafted": result.record.table[:, 0],
        "accepted": result.record.table[:, 1],
        "match": scores.match if scores else [],
        "confidence": scores.confidence if scores else [],
        "evidence": [node.evidence for node in result.nodes],
        "parents": [node.parent for node in result.nodes],
        "kept": [node.kept for node in result.nodes],
    }


class ScoreTask(_DrafterTask):
    """Trajectories, each with the chain drafters that still have to be compared with the target."""

    def run(self, pace: Pace, on_done: OnDone) -> tuple[dict[str, Rows], dict[str, float]]:
        """Return (rows of scores by drafter, seconds by stage); drafters share the target's pass."""
        rows: dict[str, Rows] = defaultdict(list)
        parts = pace.parts
        began = perf_counter()
        for row, drafters in self.work:
            chunk = parts.config.engine.prefill_chunk
            text = row.prompt_tokens, row.output_tokens
            p = target_distributions(parts.target, *text, chunk, row.sampling)  # [T, V]
            for name in drafters:
                with blaming(name), torch.inference_mode():
                    draft_replay = parts.drafters[name].would_accept(*text, p, row.sampling)
                    draft_replay.close()
                scores = draft_replay.scores
                values = {"ratio": scores.ratio, "overlap": scores.overlap} if scores else {}
                rows[name].append({"id": row.id, "ratio": [], "overlap": [], **values})
            on_done(1)
        return dict(rows), {"scores": perf_counter() - began}


@dataclass(frozen=True, slots=True)
class OutputTask:
    """Prompts to be answered by a draft model itself."""

    writer: str
    prompts: Sequence[Trajectory]

    def __len__(self) -> int:
        return len(self.prompts)

    def run(self, pace: Pace, on_done: OnDone) -> Rows:
        """Return rows of outputs: greedy, under the target's limits and stops; an output is empty where
        the prompt exceeds the draft model's context.
        """
        drafter = pace.parts.drafters[self.writer]
        assert isinstance(drafter, DraftModel)
        stops = pace.stop_token_ids()
        requests = [
            Request(
                p.prompt_id, p.prompt_tokens, p.max_new_tokens, stop_token_ids=stops, drafter=NONE
            )
            for p in self.prompts
            if len(p.prompt_tokens) <= drafter.model.max_prompt
        ]
        outputs: dict[str, list[int]] = {p.prompt_id: [] for p in self.prompts}
        only = {NONE: pace.parts.drafters[NONE]}
        driver = plain_driver(pace.parts, pace.parts.config.engine.max_rows, only, drafter.model)
        outputs.update({c.request_id: c.token_ids for c in driver.generate(requests)})
        on_done(len(self.prompts))
        return [{"id": id, "output_tokens": tokens} for id, tokens in outputs.items()]
