"""Prompts to a collection: each prompt decoded once by the target under each sampling, then every
drafter replayed on it.

Everything goes to the stores in small shards: a run that is stopped at any moment loses at most one
shard's work, and the next one continues to the same rows as a run that was never stopped. What is
collected knows no costs, so it can be priced on any machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from paceline.collection.card import Card, describe_run
from paceline.collection.draft_outputs import check_outputs
from paceline.collection.replays import OutputTask, ReplayTask, ScoreTask, is_chain, writers
from paceline.collection.trajectories import DecodeTask, EncodedPrompt, encode_prompts, under
from paceline.collection.workers import gather
from paceline.contracts import GREEDY, NONE, identity_of_arms, sampling_label
from paceline.errors import ConfigError, RequestError, StoreError
from paceline.requests import check_sampling
from paceline.selection.encoders import TargetHidden, kept_encoders
from paceline.store import Collection
from paceline.store.collection import read_trajectories

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import TypeVar

    from paceline.assembly import Pace
    from paceline.collection.workers import Progress, WorkerPool
    from paceline.contracts import PromptRecord, SamplingParams
    from paceline.store import ShardStore
    from paceline.store.layout import Trajectory

    T = TypeVar("T")

SHARD_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """What a run did. Rows are prompts under a sampling."""

    num_prompts: int  # rows in the collection now
    num_present: int  # of those given, decoded by an earlier run
    num_decoded: int
    too_long: tuple[str, ...]  # prompt ids left out, because the prompt fills the target's context
    num_replayed: dict[str, int]  # rows, by drafter
    num_scored: dict[str, int]  # rows, by drafter, where scores were asked for
    num_draft_outputs: dict[str, int]  # prompts, by who wrote, where outputs were asked for
    seconds: dict[str, float]  # decode, features, replay:DRAFTER, scores, outputs; of all workers

    @property
    def num_too_long(self) -> int:
        return len(self.too_long)


def collect_trajectories(
    pace: Pace,
    prompts: Sequence[PromptRecord],
    folder: Path | str,
    max_new_tokens: int,
    alignment: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
    shard_size: int = SHARD_SIZE,
    samplings: Sequence[SamplingParams] = (GREEDY,),
    scores: bool = False,
    outputs: Mapping[str, Path] | None = None,
    sources: Sequence[Path] = (),
    workers: int = 1,
) -> CollectionReport:
    """Decode what the folder lacks of these prompts and replay every drafter of `pace` on all of it.

    Prompts go through the chat template where the tokenizer has one; outputs end as requests of `pace`
    do. samplings: how each prompt is answered; one that is not greedy draws by `invariant` sampling with
    a seed made from its own and the prompt's id. `alignment` adds what each draft model writes on its
    own, `outputs` (name -> file) what others wrote elsewhere, both for the alignment reward. `scores`
    adds how close each draft model's distributions are to the target's. sources: the prompts' files,
    for the card. on_progress(stage, done, total) counts prompts in the stages decode, features, replay,
    scores and outputs.

    Raises ConfigError on an id given twice, StoreError if the folder was made with another target,
    tokenizer or version, or holds one of the ids with another prompt.
    """
    _check_samplings(samplings)
    given, too_long = _encode(pace, prompts, samplings)
    run = _Run(pace, Path(folder), shard_size, on_progress)
    there = run.check_present(given)
    present = {row.id for row in there}
    # before anything is decoded: a file that lacks a prompt should not cost a night
    answered = [*(row.prompt_id for row in there), *(p.id for p in prompts if p.id not in too_long)]
    elsewhere = {
        name: check_outputs(pace, name, Path(path), answered, run.collection)
        for name, path in (outputs or {}).items()
    }
    missing = [prompt for prompt in given if prompt.id not in present]
    settings = {
        "max_new_tokens": max_new_tokens,
        "samplings": [sampling_label(s).removeprefix("@") or "greedy" for s in samplings],
        "num_to_decode": len(missing),
    }
    card = Card(run.collection.folder, pace, run.encoder, describe_run(pace, sources, settings))
    card.write(read_trajectories(run.collection.trajectories), finished=False)
    with gather(pace, workers) as pool:
        run.decode(pool, missing, max_new_tokens)
        rows = read_trajectories(run.collection.trajectories)
        run.complete_features(rows)
        replayed = run.replay(pool, rows)
        scored = run.score(pool, rows) if scores else {}
        written = run.decode_draft_outputs(pool, rows) if alignment else {}
    written |= {name: found.keep() for name, found in elsewhere.items()}
    card.write(rows, finished=True)
    return CollectionReport(
        num_prompts=len(rows),
        num_present=len(given) - len(missing),
        num_decoded=len(missing),
        too_long=too_long,
        num_replayed=replayed,
        num_scored=scored,
        num_draft_outputs=written,
        seconds=dict(run.seconds),
    )


class _Run:
    """One run on one folder: its stores, and the stages that fill them."""

    def __init__(self, pace: Pace, folder: Path, shard_size: int, on_progress: Progress) -> None:
        parts = pace.parts
        self.pace, self._shard_size, self._on_progress = pace, shard_size, on_progress
        self._lines = identity_of_arms({n: d.identity() for n, d in parts.drafters.items()})
        self.encoder = kept_encoders(parts.config.selection, parts.target.hidden_size)
        self.collection = Collection(
            folder,
            parts.target.fingerprint(),
            parts.vocabulary.hash(),
            self._lines[NONE],
            parts.target.hidden_size,
        )
        self._features = {
            name: self.collection.features(name, line)
            for name, line in self.encoder.identities().items()
        }
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def check_present(self, given: Sequence[EncodedPrompt]) -> list[Trajectory]:
        """What is there. Raises StoreError if one of those given is there with another prompt."""
        tokens = {prompt.id: prompt.tokens for prompt in given}
        rows = read_trajectories(self.collection.trajectories)
        for there in rows:
            if tokens.get(there.id, there.prompt_tokens) != there.prompt_tokens:
                raise StoreError(
                    f"{self.collection.folder}: '{there.id}' is there with another prompt; give the "
                    "new prompt its own id, or collect into a new folder"
                )
        return rows

    def decode(self, pool: WorkerPool, missing: list[EncodedPrompt], max_new_tokens: int) -> None:
        # neighbours of like length waste little of a batch
        missing.sort(key=lambda prompt: (len(prompt.tokens), prompt.id))
        tasks = [DecodeTask(part, max_new_tokens) for part in self._parts(missing)]
        states = self._features[TargetHidden.name]
        # of a run that was stopped between the two stores; the prompt may have changed since
        states.drop_last_without(self.collection.trajectories.ids())
        for result in pool.do(tasks, "decode", self._on_progress):
            states.append(result.states)
            self.collection.trajectories.append(result.trajectories)
            self.seconds["decode"] += result.seconds

    def complete_features(self, rows: Sequence[Trajectory]) -> None:
        """What an encoder's store lacks: one that read no prefill, or came later."""
        missing = {
            name: [row for row in rows if row.id not in ids]
            for name, ids in ((n, store.ids()) for n, store in self._features.items())
        }
        total, done = sum(map(len, missing.values())), 0
        began = perf_counter()
        for encoder in self.encoder.encoders:
            for part in self._parts(missing[encoder.name]):
                store = self._features[encoder.name]
                store.append(encode_prompts(self.pace, encoder, part))
                done += len(part)
                self._on_progress("features", done, total)
        self.seconds["features"] += perf_counter() - began

    def replay(self, pool: WorkerPool, rows: Sequence[Trajectory]) -> dict[str, int]:
        names = [name for name in self.pace.drafters if name != NONE]
        stores = {name: self.collection.replays(name, self._lines[name]) for name in names}
        return self._complete(pool, rows, stores, ReplayTask, "replay")

    def score(self, pool: WorkerPool, rows: Sequence[Trajectory]) -> dict[str, int]:
        names = [name for name in self.pace.drafters if is_chain(self.pace.parts, name)]
        stores = {name: self.collection.scores(name, self._lines[name]) for name in names}
        return self._complete(pool, rows, stores, ScoreTask, "scores")

    def _complete(
        self,
        pool: WorkerPool,
        rows: Sequence[Trajectory],
        stores: Mapping[str, ShardStore],
        kind: type[ReplayTask | ScoreTask],
        stage: str,
    ) -> dict[str, int]:
        """Do for every row what its drafters' stores lack; how many rows that was, by drafter."""
        there = {name: store.ids() for name, store in stores.items()}
        lacking = [(row, [n for n, ids in there.items() if row.id not in ids]) for row in rows]
        tasks = [kind(part) for part in self._parts([work for work in lacking if work[1]])]
        counts = Counter(dict.fromkeys(stores, 0))
        for found, seconds in pool.do(tasks, stage, self._on_progress):
            for name, of_drafter in found.items():
                stores[name].append(of_drafter)
                counts[name] += len(of_drafter)
            for what, spent in seconds.items():
                self.seconds[what] += spent
        return dict(counts)

    def decode_draft_outputs(self, pool: WorkerPool, rows: Sequence[Trajectory]) -> dict[str, int]:
        """Each draft model's own greedy output to every prompt, once for all samplings."""
        prompts = list({row.prompt_id: row for row in reversed(rows)}.values())[::-1]
        names = writers(self.pace.parts)
        stores = {name: self.collection.outputs(name, self._lines[name]) for name in names}
        there = {name: store.ids() for name, store in stores.items()}
        tasks = [
            OutputTask(name, part)
            for name in names
            for part in self._parts([p for p in prompts if p.prompt_id not in there[name]])
        ]
        began = perf_counter()
        counts = Counter(dict.fromkeys(names, 0))
        for task, found in zip(tasks, pool.do(tasks, "outputs", self._on_progress), strict=True):
            stores[task.writer].append(found)
            counts[task.writer] += len(found)
        self.seconds["outputs"] += perf_counter() - began
        return dict(counts)

    def _parts(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Neighbours, a shard's worth at a time."""
        for start in range(0, len(items), self._shard_size):
            yield items[start : start + self._shard_size]


def _check_samplings(samplings: Sequence[SamplingParams]) -> None:
    if not samplings:
        raise ConfigError("name at least one sampling, such as temperature 0")
    labels = [sampling_label(sampling) for sampling in samplings]
    if len(set(labels)) < len(labels):
        raise ConfigError("a temperature is given twice; one row would have to hold two answers")
    for sampling in samplings:
        try:
            check_sampling(under("", sampling)[1])
        except RequestError as error:
            raise ConfigError(str(error)) from error


def _encode(
    pace: Pace, prompts: Sequence[PromptRecord], samplings: Sequence[SamplingParams]
) -> tuple[list[EncodedPrompt], tuple[str, ...]]:
    """(prompts as tokens, under every sampling; ids of those too long)."""
    as_messages = getattr(pace.parts.tokenizer, "chat_template", None) is not None
    encoded: dict[str, EncodedPrompt] = {}
    too_long: list[str] = []
    for record in prompts:
        message: Any = {"role": "user", "content": record.prompt}
        tokens = tuple(pace.encode([message] if as_messages else record.prompt))
        # in a full context the answer is one token, and nothing can be drafted
        fits = len(tokens) < pace.parts.target.context_length
        for sampling in samplings:
            id, seeded = under(record.id, sampling)
            if id in encoded:
                raise ConfigError(
                    f"prompt id '{record.id}' occurs twice; give every prompt its own id"
                )
            encoded[id] = EncodedPrompt(id, record.domain, tokens if fits else (), seeded)
        if not fits:
            too_long.append(record.id)
    return [prompt for prompt in encoded.values() if prompt.tokens], tuple(too_long)
