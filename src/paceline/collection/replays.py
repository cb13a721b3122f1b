"""Every arm along every trajectory, and what draft models write on their own.

One teacher-forced pass of the target serves all arms of a prompt; what is stored does not depend on
costs. Arms are completed one by one, so an arm that was added later is replayed without decoding.
Symbols: T output tokens, V the target's logits width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.collection.trajectories import lone_engine, parts_of
from paceline.contracts import NONE, Request, identity_of_arms
from paceline.drafting.draft_model import DraftModel
from paceline.replay import max_output, replay, target_distributions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.assembly import Pace, Parts
    from paceline.collection.trajectories import Progress
    from paceline.replay import Replay
    from paceline.store import Collection, ShardStore
    from paceline.store.collection import Trajectory


def replay_arms(
    parts: Parts,
    trajectories: Sequence[Trajectory],
    collection: Collection,
    shard_size: int,
    on_progress: Progress,
) -> dict[str, int]:
    """Replay what each arm's store lacks; returns how many prompts that was, by arm."""
    drafters = {arm: drafter for arm, drafter in parts.drafters.items() if arm != NONE}
    lines = identity_of_arms({arm: drafter.identity() for arm, drafter in drafters.items()})
    stores = {arm: collection.replays(arm, lines[arm]) for arm in drafters}
    there = {arm: store.ids() for arm, store in stores.items()}
    missing = [t for t in trajectories if any(t.id not in ids for ids in there.values())]
    done = 0
    for part in parts_of(missing, shard_size):
        rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in drafters}
        for trajectory in part:
            arms = [arm for arm, ids in there.items() if trajectory.id not in ids]
            for arm, result in _replay_one(parts, trajectory, arms):
                rows[arm].append(_replay_row(trajectory.id, result))
            done += 1
            on_progress("replay", done, len(missing))
        for arm, store in stores.items():
            store.append(rows[arm])
    return {arm: sum(t.id not in ids for t in missing) for arm, ids in there.items()}


def _replay_one(
    parts: Parts, trajectory: Trajectory, arms: Sequence[str]
) -> Iterator[tuple[str, Replay]]:
    prompt, output = trajectory.prompt_tokens, trajectory.output_tokens
    limit = max_output(trajectory.max_new_tokens, len(prompt), parts.target.context_length)
    p = target_distributions(
        parts.target, prompt, output, parts.config.engine.prefill_chunk
    )  # [T, V]
    for arm in arms:
        yield arm, replay(parts.drafters[arm], prompt, output, limit, p)


def _replay_row(id: str, result: Replay) -> dict[str, Any]:
    scores = result.scores
    return {
        "id": id,
        "everywhere": result.kept.everywhere,
        "drafted": result.kept.table[:, 0],
        "accepted": result.kept.table[:, 1],
        "match": scores.match if scores else [],
        "ratio": scores.ratio if scores else [],
        "overlap": scores.overlap if scores else [],
        "confidence": scores.confidence if scores else [],
    }


def decode_drafters(
    pace: Pace,
    trajectories: Sequence[Trajectory],
    collection: Collection,
    shard_size: int,
    on_progress: Progress,
) -> dict[str, int]:
    """Each draft model's own greedy output where its store lacks it; returns how many, by arm."""
    drafters = {
        arm: drafter
        for arm, drafter in pace.parts.drafters.items()
        # one with a vocabulary of its own writes no text in the target's tokens
        if isinstance(drafter, DraftModel) and drafter.needs.same_vocabulary
    }
    lines = identity_of_arms({arm: drafter.identity() for arm, drafter in drafters.items()})
    stores: dict[str, ShardStore] = {a: collection.outputs(a, lines[a]) for a in drafters}
    there = {arm: store.ids() for arm, store in stores.items()}
    missing = {arm: [t for t in trajectories if t.id not in there[arm]] for arm in drafters}
    total = sum(len(of_arm) for of_arm in missing.values())
    done = 0
    for arm, drafter in drafters.items():
        for part in parts_of(missing[arm], shard_size):
            outputs = _decode_alone(pace, drafter, part)
            stores[arm].append([{"id": t.id, "output_tokens": outputs[t.id]} for t in part])
            done += len(part)
            on_progress("outputs", done, total)
    return {arm: len(of_arm) for arm, of_arm in missing.items()}


def _decode_alone(
    pace: Pace, drafter: DraftModel, trajectories: Sequence[Trajectory]
) -> dict[str, list[int]]:
    """Under the target's limits and stops; nothing where the prompt exceeds the model's context."""
    engine = lone_engine(pace.parts, drafter.model)
    stops = pace.stop_token_ids()
    requests = [
        Request(t.id, t.prompt_tokens, t.max_new_tokens, stop_token_ids=stops, drafter=NONE)
        for t in trajectories
        if len(t.prompt_tokens) <= drafter.model.context_length
    ]
    outputs: dict[str, list[int]] = {t.id: [] for t in trajectories}
    outputs.update({c.request_id: c.token_ids for c in engine.generate(requests)})
    return outputs
