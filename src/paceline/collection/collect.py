"""Collect prompts: decode each once with the target under each sampling, index the answers, then replay
every drafter.

Results go to the stores in small shards. A run that is stopped at any moment loses at most one shard's
work, and the next run continues to the same rows as one that was never stopped. Stored results do not
depend on costs, so they can be priced on any machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from paceline.collection.answers import build_answers
from paceline.collection.card import Card, describe_run
from paceline.collection.draft_outputs import load_outputs
from paceline.collection.replays import OutputTask, ReplayTask, ScoreTask
from paceline.collection.trajectories import DecodeTask, EncodedPrompt, encode_prompts
from paceline.collection.workers import open_pool
from paceline.contracts import GREEDY, NONE, identity_of_arms, no_progress
from paceline.drafting.draft_model import DraftModel
from paceline.errors import ConfigError, RequestError, StoreError
from paceline.requests import check_sampling
from paceline.selection.encoders import TargetHidden, kept_encoders
from paceline.store import Collection
from paceline.store.collection import read_trajectories
from paceline.store.records import sampling_label, seed_sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import TypeVar

    from paceline.assembly import Pace
    from paceline.collection.workers import WorkerPool
    from paceline.contracts import Progress, PromptRecord, SamplingParams
    from paceline.store import ShardStore
    from paceline.store.layout import Trajectory

    T = TypeVar("T")

SHARD_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """The counts of one run. A row is a prompt under one sampling."""

    num_prompts: int  # rows in the collection now
    num_present: int  # given rows that an earlier run decoded
    num_decoded: int
    too_long: tuple[str, ...]  # ids of prompts left out, because they fill the target's context
    num_replayed: dict[str, int]  # rows, by drafter
    num_scored: dict[str, int]  # rows, by drafter, where scores were asked for
    num_draft_outputs: dict[str, int]  # prompts, by writer, where outputs were asked for
    # decode, features, answers, replay:DRAFTER, scores, outputs; of all workers
    seconds: dict[str, float]


def collect_trajectories(
    pace: Pace,
    prompts: Sequence[PromptRecord],
    folder: Path | str,
    max_new_tokens: int,
    alignment: bool = False,
    on_progress: Progress = no_progress,
    shard_size: int = SHARD_SIZE,
    samplings: Sequence[SamplingParams] = (GREEDY,),
    scores: bool = False,
    outputs: Mapping[str, Path] | None = None,
    sources: Sequence[Path] = (),
    workers: int = 1,
) -> CollectionReport:
    """Decode the prompts that the folder lacks and replay every drafter of `pace` on all its rows.

    Prompts go through the chat template where the tokenizer has one; outputs end as requests of `pace`
    do. samplings: each prompt is answered under each; a sampling that is not greedy draws by `invariant`
    sampling with a seed made from its own and the prompt's id. `alignment` adds each draft model's own
    outputs, `outputs` (name -> file) those of other models, both for the alignment reward. `scores` adds
    the closeness of each draft model's distributions to the target's. sources: the prompts' files, for
    the card. on_progress counts prompts in the stages decode, features, answers, replay, scores and
    outputs.

    Raises ConfigError on a repeated id, StoreError if the folder was made with another target,
    tokenizer or version, or stores another prompt under one of the ids.
    """
    _check_samplings(samplings)
    given, too_long = _encode(pace, prompts, samplings)
    run = _CollectionRun(pace, Path(folder), shard_size, on_progress)
    stored = run.check_stored(given)
    stored_ids = {row.id for row in stored}
    # checked before hours of decoding
    ids = [*(row.prompt_id for row in stored), *(p.id for p in prompts if p.id not in too_long)]
    external = {
        name: load_outputs(pace, name, Path(path), ids, run.collection)
        for name, path in (outputs or {}).items()
    }
    missing = [prompt for prompt in given if prompt.id not in stored_ids]
    texts = {prompt.id: prompt.prompt for prompt in prompts}
    settings = {
        "max_new_tokens": max_new_tokens,
        "samplings": [sampling_label(s).removeprefix("@") or "greedy" for s in samplings],
        "num_to_decode": len(missing),
    }
    card = Card(run.collection.folder, pace, run.encoder, describe_run(pace, sources, settings))
    card.write(stored, finished=False)
    with open_pool(pace, workers) as pool:
        run.decode(pool, missing, max_new_tokens)
        rows = read_trajectories(run.collection.trajectories)
        run.complete_features(rows)
        run.record_training(rows, texts)
        run.index_answers(rows)
        num_replayed = run.replay(pool, rows)
        num_scored = run.score(pool, rows) if scores else {}
        num_outputs = run.decode_draft_outputs(pool, rows) if alignment else {}
    num_outputs |= {name: of_writer.save() for name, of_writer in external.items()}
    card.write(rows, finished=True, trained_on=run.num_trained_on)
    return CollectionReport(
        num_prompts=len(rows),
        num_present=len(given) - len(missing),
        num_decoded=len(missing),
        too_long=too_long,
        num_replayed=num_replayed,
        num_scored=num_scored,
        num_draft_outputs=num_outputs,
        seconds=dict(run.seconds),
    )


class _CollectionRun:
    """One run on one folder: its stores, and the stages that fill them."""

    def __init__(self, pace: Pace, folder: Path, shard_size: int, on_progress: Progress) -> None:
        parts = pace.parts
        self.pace, self._shard_size, self._on_progress = pace, shard_size, on_progress
        self._identities = identity_of_arms({n: d.identity() for n, d in parts.drafters.items()})
        self.encoder = kept_encoders(parts.config.selection, parts.target.hidden_size)
        self.collection = Collection(
            folder,
            parts.target.fingerprint(),
            parts.vocabulary.hash(),
            self._identities[NONE],
            parts.target.hidden_size,
        )
        self._features = {
            name: self.collection.features(name, line)
            for name, line in self.encoder.identities().items()
        }
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_trained_on: dict[str, dict[str, int] | None] = {}  # see `record_training`

    def check_stored(self, given: Sequence[EncodedPrompt]) -> list[Trajectory]:
        """Return the stored rows. Raises StoreError if a given id is stored with another prompt."""
        tokens = {prompt.id: prompt.tokens for prompt in given}
        rows = read_trajectories(self.collection.trajectories)
        for row in rows:
            if tokens.get(row.id, row.prompt_tokens) != row.prompt_tokens:
                raise StoreError(
                    f"{self.collection.folder}: '{row.id}' is there with another prompt; give the "
                    "new prompt its own id, or collect into a new folder"
                )
        return rows

    def decode(self, pool: WorkerPool, missing: list[EncodedPrompt], max_new_tokens: int) -> None:
        """Decode and store prompts, with the hidden features of each."""
        # rows of similar length need little padding
        missing.sort(key=lambda prompt: (len(prompt.tokens), prompt.id))
        tasks = [DecodeTask(part, max_new_tokens) for part in self._split(missing)]
        features = self._features[TargetHidden.name]
        # left by a run that was stopped between the two stores; the prompt may have changed since
        features.drop_last_shards_without(self.collection.trajectories.ids())
        for shard in pool.run_tasks(tasks, "decode", self._on_progress):
            features.append(shard.hidden_features)
            self.collection.trajectories.append(shard.trajectories)
            self.seconds["decode"] += shard.seconds

    def complete_features(self, rows: Sequence[Trajectory]) -> None:
        """Add the rows that an encoder's store lacks: it needs no prefill, or was added later."""
        missing = {
            name: [row for row in rows if row.id not in ids]
            for name, ids in ((n, store.ids()) for n, store in self._features.items())
        }
        total, done = sum(map(len, missing.values())), 0
        began = perf_counter()
        for encoder in self.encoder.encoders:
            for part in self._split(missing[encoder.name]):
                self._features[encoder.name].append(encode_prompts(self.pace, encoder, part))
                done += len(part)
                self._on_progress("features", done, total)
        self.seconds["features"] += perf_counter() - began

    def index_answers(self, rows: Sequence[Trajectory]) -> None:
        """Renew the index of the answers, from which drafters may draft when they are replayed."""
        began = perf_counter()
        if build_answers(self.pace.parts, self.collection.folder, rows, self._on_progress):
            self.seconds["answers"] += perf_counter() - began

    def replay(self, pool: WorkerPool, rows: Sequence[Trajectory]) -> dict[str, int]:
        """Replay every drafter on the rows that its store lacks; return their number by drafter."""
        names = [
            name
            for name, drafter in self.pace.parts.drafters.items()
            if name != NONE and not drafter.composed
        ]
        stores = {name: self.collection.replays(name, self._identities[name]) for name in names}
        return self._complete(pool, rows, stores, ReplayTask, "replay")

    def record_training(self, rows: Sequence[Trajectory], texts: Mapping[str, str]) -> None:
        """Record for each drafter whether it was trained on the prompts that its record lacks.

        texts: prompt id -> its text. A prompt of an earlier run that is not given again has none, and a
        drafter that does not know its training prompts has no record: both stay unknown.
        `num_trained_on` gets the counts, None for such a drafter.
        """
        ids = list(dict.fromkeys(row.prompt_id for row in rows))
        for name, drafter in self.pace.parts.drafters.items():
            prompts = drafter.trained_on()
            if name == NONE:
                continue
            if prompts is None:
                self.num_trained_on[name] = None
                continue
            store = self.collection.trained_on(name, self._identities[name], prompts.digest())
            stored = {row["id"]: row["trained_on"] for row in store.read().to_pylist()}
            new = {id: texts[id] in prompts for id in ids if id in texts and id not in stored}
            store.append([{"id": id, "trained_on": trained} for id, trained in new.items()])
            known = stored | new
            self.num_trained_on[name] = {"known": len(known), "trained_on": sum(known.values())}

    def score(self, pool: WorkerPool, rows: Sequence[Trajectory]) -> dict[str, int]:
        """Score every chain drafter on the rows that its store lacks; return their number by drafter."""
        stores = {
            name: self.collection.scores(name, self._identities[name])
            for name, drafter in self.pace.parts.drafters.items()
            if isinstance(drafter, DraftModel)  # it has a distribution at every position
        }
        return self._complete(pool, rows, stores, ScoreTask, "scores")

    def _complete(
        self,
        pool: WorkerPool,
        rows: Sequence[Trajectory],
        stores: Mapping[str, ShardStore],
        task_type: type[ReplayTask | ScoreTask],
        stage: str,
    ) -> dict[str, int]:
        """Add the rows that each drafter's store lacks; return their number by drafter."""
        stored = {name: store.ids() for name, store in stores.items()}
        lacking = [(row, [n for n, ids in stored.items() if row.id not in ids]) for row in rows]
        tasks = [task_type(part) for part in self._split([work for work in lacking if work[1]])]
        counts = Counter(dict.fromkeys(stores, 0))
        for rows_by_drafter, seconds in pool.run_tasks(tasks, stage, self._on_progress):
            for name, new_rows in rows_by_drafter.items():
                stores[name].append(new_rows)
                counts[name] += len(new_rows)
            for part, spent in seconds.items():
                self.seconds[part] += spent
        return dict(counts)

    def decode_draft_outputs(self, pool: WorkerPool, rows: Sequence[Trajectory]) -> dict[str, int]:
        """Decode each draft model's own greedy output to every prompt, once for all samplings; return
        the number of new outputs by draft model.
        """
        prompts = {row.prompt_id: row for row in reversed(rows)}  # the first row of each prompt
        stores = {
            name: self.collection.outputs(name, self._identities[name])
            for name, drafter in self.pace.parts.drafters.items()
            if isinstance(drafter, DraftModel) and drafter.needs.same_vocabulary
        }
        tasks = [
            OutputTask(name, part)
            for name, ids in ((name, store.ids()) for name, store in stores.items())
            for part in self._split([p for id, p in reversed(prompts.items()) if id not in ids])
        ]
        began = perf_counter()
        counts = Counter(dict.fromkeys(stores, 0))
        results = pool.run_tasks(tasks, "outputs", self._on_progress)
        for task, new_rows in zip(tasks, results, strict=True):
            stores[task.writer].append(new_rows)
            counts[task.writer] += len(new_rows)
        self.seconds["outputs"] += perf_counter() - began
        return dict(counts)

    def _split(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Yield consecutive items, one shard at a time."""
        for start in range(0, len(items), self._shard_size):
            yield items[start : start + self._shard_size]


def _check_samplings(samplings: Sequence[SamplingParams]) -> None:
    if not samplings:
        raise ConfigError("name at least one sampling, such as temperature 0")
    labels = [sampling_label(sampling) for sampling in samplings]
    if len(set(labels)) < len(labels):
        raise ConfigError("a temperature is given twice; a row holds one answer")
    for sampling in samplings:
        try:
            check_sampling(seed_sampling("", sampling)[1])
        except RequestError as error:
            raise ConfigError(str(error)) from error


def _encode(
    pace: Pace, prompts: Sequence[PromptRecord], samplings: Sequence[SamplingParams]
) -> tuple[list[EncodedPrompt], tuple[str, ...]]:
    """Return (prompts as tokens, under every sampling; ids of those that are too long)."""
    as_messages = getattr(pace.parts.tokenizer, "chat_template", None) is not None
    encoded: dict[str, EncodedPrompt] = {}
    too_long: list[str] = []
    for record in prompts:
        message: Any = {"role": "user", "content": record.prompt}
        tokens = tuple(pace.encode([message] if as_messages else record.prompt))
        # in a full context the answer is one token, and nothing can be drafted
        fits = pace.parts.target.has_room_after(len(tokens))
        for sampling in samplings:
            id, seeded = seed_sampling(record.id, sampling)
            if id in encoded:
                raise ConfigError(
                    f"prompt id '{record.id}' occurs twice; give every prompt its own id"
                )
            encoded[id] = EncodedPrompt(id, record.domain, tokens if fits else (), seeded)
        if not fits:
            too_long.append(record.id)
    return [prompt for prompt in encoded.values() if prompt.tokens], tuple(too_long)
