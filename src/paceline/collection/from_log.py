"""Add logged requests to a collection: they need no decoding, only a replay of every arm.

The log shows one arm per request; its token ids let all arms be replayed. Only greedy requests without
rules are added, because a collection's trajectories are the target's own greedy text. Knows no costs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.collection.collect import SHARD_SIZE, CollectionReport, collect_trajectories
from paceline.contracts import GREEDY, NONE, identity_of_arms, no_progress
from paceline.errors import StoreError
from paceline.store import Collection
from paceline.store.layout import Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Pace
    from paceline.contracts import Progress
    from paceline.store import LoggedDecision

SERVED: Final = "served"
"""The domain of logged prompts, whose real domain is unknown."""


@dataclass(frozen=True, slots=True)
class LogReport:
    """The counts of one run. left_out: reason -> number of requests."""

    num_added: int
    num_present: int  # logged prompts that the collection had before
    left_out: dict[str, int]
    collection: CollectionReport


def collect_log(
    pace: Pace,
    decisions: Sequence[LoggedDecision],
    folder: Path | str,
    on_progress: Progress = no_progress,
    shard_size: int = SHARD_SIZE,
) -> LogReport:
    """Add the requests that this target served to a collection, and replay every arm of `pace`.

    A prompt that was served several times is added once, with its longest answer. Resumes like
    `collect_trajectories`. Raises StoreError if no request can be added.
    """
    parts = pace.parts
    made_with = (parts.target.fingerprint(), parts.vocabulary.hash())
    served, left_out = _select(decisions, *made_with, parts.target.context_length)
    if not served:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise StoreError(
            f"none of {len(decisions)} logged requests can be replayed: {why or 'the log is empty'}"
        )
    none = identity_of_arms({NONE: parts.drafters[NONE].identity()})[NONE]
    collection = Collection(Path(folder), *made_with, none, parts.target.hidden_size)
    present = collection.trajectories.ids()
    missing = [row for id, row in sorted(served.items()) if id not in present]
    for start in range(0, len(missing), shard_size):
        part = missing[start : start + shard_size]
        collection.trajectories.append([row.to_row() for row in part])
    report = collect_trajectories(pace, [], folder, max_new_tokens=1, on_progress=on_progress)
    return LogReport(len(missing), len(served) - len(missing), left_out, report)


def _select(
    decisions: Sequence[LoggedDecision], target: str, tokenizer: str, context: int
) -> tuple[dict[str, Trajectory], dict[str, int]]:
    """Return (id -> trajectory with the longest answer, reason -> number of requests left out)."""
    served: dict[str, Trajectory] = {}
    left_out: Counter[str] = Counter()
    for decision in decisions:
        if reason := _why_not(decision, target, tokenizer, context):
            left_out[reason] += 1
            continue
        row = _to_trajectory(decision)
        if row.id not in served or len(served[row.id].output_tokens) < len(row.output_tokens):
            served[row.id] = row
    return served, dict(left_out)


def _why_not(decision: LoggedDecision, target: str, tokenizer: str, context: int) -> str | None:
    if reason := decision.why_no_text(target, tokenizer, context):
        return reason
    if decision.sampling.temperature > 0 or decision.has_rules:
        return "were sampled, or had rules for the logits"
    return None


def _to_trajectory(decision: LoggedDecision) -> Trajectory:
    assert decision.prompt_tokens is not None and decision.output_tokens is not None
    tokens = np.array(decision.prompt_tokens, dtype="<i8").tobytes()
    return Trajectory(
        id=f"{SERVED}-{hashlib.sha256(tokens).hexdigest()[:16]}",
        domain=SERVED,
        prompt_tokens=decision.prompt_tokens,
        output_tokens=decision.output_tokens,
        finish_reason=decision.finish_reason,
        max_new_tokens=decision.max_new_tokens,
        sampling=GREEDY,
    )
