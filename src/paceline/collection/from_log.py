"""Logged requests to a collection: what was served needs no decoding, only every arm's replay.

The log tells how one arm did on a request; with its token ids all of them can be replayed on it, as if
each had been tried. Only greedy requests without rules are taken, for a collection's trajectories
are the target's own greedy text. Knows no costs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.collection.collect import SHARD_SIZE, CollectionReport, collect_trajectories
from paceline.contracts import GREEDY, NONE, identity_of_arms
from paceline.errors import StoreError
from paceline.store import Collection
from paceline.store.layout import Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Pace
    from paceline.collection.workers import Progress
    from paceline.store import LoggedDecision

SERVED: Final = "served"
"""The domain of logged prompts: what they are about was not said."""


@dataclass(frozen=True, slots=True)
class LogReport:
    """What was taken from a log. left_out: why not, and of how many requests."""

    num_added: int
    num_present: int  # prompts that the collection had from the log before
    left_out: dict[str, int]
    collection: CollectionReport


def collect_log(
    pace: Pace,
    decisions: Sequence[LoggedDecision],
    folder: Path | str,
    on_progress: Progress = lambda stage, done, total: None,
    shard_size: int = SHARD_SIZE,
) -> LogReport:
    """Add what was served by this target to a collection, and replay every arm of `pace` on it.

    Of a prompt served several times the longest answer is taken, once. Resumes as
    `collect_trajectories` does. Raises StoreError if there is nothing to take.
    """
    parts = pace.parts
    made_with = (parts.target.fingerprint(), parts.vocabulary.hash())
    served, left_out = _usable(decisions, *made_with, parts.target.context_length)
    if not served:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise StoreError(
            f"none of {len(decisions)} logged requests can be replayed: {why or 'the log is empty'}"
        )
    none = identity_of_arms({NONE: parts.drafters[NONE].identity()})[NONE]
    collection = Collection(Path(folder), *made_with, none, parts.target.hidden_size)
    present = collection.trajectories.ids()
    missing = [id for id in sorted(served) if id not in present]
    for start in range(0, len(missing), shard_size):
        part = missing[start : start + shard_size]
        collection.trajectories.append([_trajectory(id, served[id]).row() for id in part])
    report = collect_trajectories(pace, [], folder, max_new_tokens=1, on_progress=on_progress)
    return LogReport(len(missing), len(served) - len(missing), left_out, report)


def _usable(
    decisions: Sequence[LoggedDecision], target: str, tokenizer: str, context: int
) -> tuple[dict[str, LoggedDecision], dict[str, int]]:
    """(id -> the decision with the longest answer, why others were left out)."""
    found: dict[str, LoggedDecision] = {}
    left_out: Counter[str] = Counter()
    for decision in decisions:
        if reason := _why_not(decision, target, tokenizer, context):
            left_out[reason] += 1
            continue
        tokens = np.array(decision.prompt_tokens, dtype="<i8").tobytes()
        id = f"{SERVED}-{hashlib.sha256(tokens).hexdigest()[:16]}"
        if id not in found or found[id].num_output < decision.num_output:
            found[id] = decision
    return found, dict(left_out)


def _why_not(decision: LoggedDecision, target: str, tokenizer: str, context: int) -> str | None:
    if (decision.header.target, decision.header.tokenizer) != (target, tokenizer):
        return "were served by another target"
    if decision.prompt_tokens is None or not decision.output_tokens:
        return "have no token ids (log.tokens: ids keeps them)"
    if decision.finish_reason not in ("stop", "length"):
        return "did not finish"
    if decision.sampling.temperature > 0 or decision.has_rules:
        return "were sampled, or had rules for the logits"
    if decision.num_prompt >= context:
        return "fill the target's context with the prompt"
    return None


def _trajectory(id: str, decision: LoggedDecision) -> Trajectory:
    assert decision.prompt_tokens is not None and decision.output_tokens is not None
    return Trajectory(
        id=id,
        domain=SERVED,
        prompt_tokens=decision.prompt_tokens,
        output_tokens=decision.output_tokens,
        finish_reason=decision.finish_reason,
        max_new_tokens=decision.max_new_tokens,
        sampling=GREEDY,
    )
