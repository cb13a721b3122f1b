"""The target's answers to training prompts, which a drafter learns to predict.

The target answers each prompt once per sampling, in batches of paceline's engine, with a drafter for
speed: the answers are the target's own with any drafter. A sampled answer has a seed of its prompt's id
and its sampling. One shard store per data file keeps the answers, so a killed run resumes and several
drafters share them. A cap selects the prompts with the lowest hashes: a larger cap adds prompts and
removes none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paceline.assembly import Pace, build
from paceline.config import Config
from paceline.contracts import AUTO, NONE
from paceline.distillation.batches import Example
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.errors import ConfigError, StoreError, shorten, suggest_name
from paceline.selection import UntrainedController
from paceline.store import ShardStore
from paceline.store.records import seed_sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from paceline.contracts import PromptRecord, Request, SamplingParams
    from paceline.distillation.settings import AnswerSampling

KIND = "outputs"
OUTPUT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # the prompt's id and the sampling's label, which is "" for greedy
        ("domain", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("output_tokens", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
    ]
)
_LOOKUP = "lookup"
_REMEDY = "delete or rename this folder, or name another folder as 'outputs'"


def open_outputs(pace: Pace, folder: Path, max_new_tokens: int) -> ShardStore:
    """Return the store of this target's answers.

    Raises StoreError for another target's or limit's, or for one of an earlier version.
    """
    identity = {
        "target": pace.parts.target.fingerprint(),
        "tokenizer": pace.parts.vocabulary.hash(),
        "max_new_tokens": max_new_tokens,
    }
    return ShardStore(folder, KIND, OUTPUT_SCHEMA, identity, _REMEDY)


# --- reading --------------------------------------------------------------------------------------


def read_examples(
    store: ShardStore, prompts: Sequence[PromptRecord], samplings: Sequence[AnswerSampling]
) -> list[Example]:
    """Return the texts of the prompts that have an answer, in the order of `prompts` and `samplings`.

    An answer that a prompt has under an earlier sampling is left out. The id of an example is the id of
    its prompt with the sampling's label, see `store.records.sampling_label`.
    """
    table = store.read()
    row_of = {id: i for i, id in enumerate(table.column("id").to_pylist())}
    prompt_tokens = _arrays(table.column("prompt_tokens"))
    output_tokens = _arrays(table.column("output_tokens"))
    examples = []
    for record in prompts:
        seen: set[bytes] = set()
        for sampling in samplings:
            id, _ = seed_sampling(record.id, sampling.params())
            i = row_of.get(id)
            if i is None or not len(output_tokens[i]) or output_tokens[i].tobytes() in seen:
                continue
            seen.add(output_tokens[i].tobytes())
            tokens = np.concatenate([prompt_tokens[i], output_tokens[i]]).astype(np.int64)
            examples.append(Example(id, record.domain, tokens, len(prompt_tokens[i])))
    return examples


def answered_prompts(
    examples: Sequence[Example],
    prompts: Sequence[PromptRecord],
    samplings: Sequence[AnswerSampling],
) -> list[PromptRecord]:
    """Return the prompts that any of the examples was made from."""
    ids = {example.id for example in examples}
    params = [sampling.params() for sampling in samplings]
    return [r for r in prompts if any(seed_sampling(r.id, p)[0] in ids for p in params)]


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return the lists of a column as views of one array: Python lists would take ten times as long."""
    values = pc.list_flatten(column).to_numpy()
    ends = np.cumsum(pc.list_value_length(column).to_numpy())
    return np.split(values, ends[:-1]) if len(ends) else []


# --- answering ------------------------------------------------------------------------------------


def open_target(config: Config, drafter: str | None) -> Pace:
    """Load a configuration's target, and of its drafters only the one that speeds up answering.

    drafter: its name; the others need not exist. Raises ConfigError if it is not configured, and
    otherwise as `assembly.build` does.
    """
    kept: dict[str, Any] = {}
    if drafter not in (None, NONE):
        if drafter not in config.drafters:
            raise _unknown(str(drafter), [*config.drafters, NONE])
        section = config.drafters[drafter]
        names = {drafter, *section.settings.get("parts", ())}  # a cascade has others as parts
        kept = {name: given for name, given in config.drafters.items() if name in names}
    return Pace(build(config.model_copy(update={"drafters": kept})))


@dataclass(frozen=True, slots=True)
class Answerer:
    """A target that answers prompts. arm: the drafter of its requests."""

    pace: Pace
    arm: str

    @classmethod
    def of(cls, pace: Pace, drafter: str | None) -> Answerer:
        """Return an answerer of a pace's target with one of its drafters.

        None: a suffix lookup that also matches earlier answers, and `none` where that does not pay by
        the clock. Raises ConfigError if there is no drafter of this name.
        """
        if drafter is not None:
            if drafter not in pace.parts.drafters:
                raise _unknown(drafter, pace.parts.drafters)
            return cls(pace, drafter)
        lookup = SuffixLookup(_LOOKUP, SuffixLookupSettings(share=True))
        plain = pace.parts.drafters[NONE]
        parts = replace(pace.parts, drafters={NONE: plain, _LOOKUP: lookup})
        controller = UntrainedController(_LOOKUP)
        return cls(Pace(parts, controller.choose, controller), AUTO)

    def request(self, question: _Question, max_new_tokens: int) -> Request:
        """Return the request of a question, without the target's own generation settings."""
        sampling = question.sampling
        drawn: dict[str, Any] = {
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "sampling": sampling.method,
        }
        return self.pace.request(
            question.tokens,
            id=question.id,
            max_new_tokens=max_new_tokens,
            temperature=sampling.temperature,
            drafter=self.arm,
            generation_config="none",
            **(drawn if sampling.temperature else {}),
        )


@dataclass(frozen=True, slots=True)
class _Question:
    """A prompt under one sampling, with its own seed."""

    id: str
    domain: str
    tokens: list[int]
    sampling: SamplingParams


def decode_outputs(
    pace: Pace,
    prompts: Sequence[PromptRecord],
    samplings: Sequence[AnswerSampling],
    store: ShardStore,
    max_new_tokens: int,
    drafter: str | None = None,
    shard_size: int = 512,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Decode the answers that the store lacks, except to prompts too long for the target's context.

    drafter: see `Answerer.of`. on_done: called after each answer with the number of answers of this
    call, so far and in total.

    Raises ConfigError if the drafter is unknown, or if the ids of two answers are the same; StoreError
    if a stored answer is to another prompt of the same id.
    """
    answerer = Answerer.of(pace, drafter)
    remaining = _encode_remaining(pace, prompts, samplings, store)
    done = 0
    for first in range(0, len(remaining), shard_size):
        part = {question.id: question for question in remaining[first : first + shard_size]}
        requests = [answerer.request(question, max_new_tokens) for question in part.values()]
        rows = []
        for completion in answerer.pace.stream(requests):
            question = part[completion.request_id]
            rows.append(
                {
                    "id": question.id,
                    "domain": question.domain,
                    "prompt_tokens": question.tokens,
                    "output_tokens": completion.token_ids,
                    "finish_reason": completion.finish_reason,
                    "temperature": question.sampling.temperature,
                    "top_p": question.sampling.top_p,
                }
            )
            done += 1
            on_done(done, len(remaining))
        store.append(rows)


def _encode_remaining(
    pace: Pace,
    prompts: Sequence[PromptRecord],
    samplings: Sequence[AnswerSampling],
    store: ShardStore,
) -> list[_Question]:
    """Return the questions to decode, in order of length: rows of similar length end together.

    Raises StoreError if a stored answer is to another prompt: its file or the chat template has changed.
    """
    has_template = getattr(pace.parts.tokenizer, "chat_template", None) is not None
    table = store.read()
    stored = dict(
        zip(table.column("id").to_pylist(), _arrays(table.column("prompt_tokens")), strict=True)
    )
    asked: set[str] = set()
    remaining = []
    for record in prompts:
        message: Any = {"role": "user", "content": record.prompt}
        tokens = pace.encode([message] if has_template else record.prompt)
        missing = []
        for sampling in samplings:
            id, seeded = seed_sampling(record.id, sampling.params())
            if id in asked:
                raise ConfigError(
                    f"the id {shorten(id)} belongs to the answers to two prompts; rename one of the "
                    "prompts"
                )
            asked.add(id)
            if id not in stored:
                missing.append((id, seeded))
            elif not np.array_equal(stored[id], tokens):
                raise StoreError(
                    f"{store.folder}: its answer {shorten(id)} is to another prompt than the one with "
                    f"this id now; {_REMEDY}"
                )
        if pace.parts.target.has_room_after(len(tokens)):
            remaining += [_Question(id, record.domain, tokens, seeded) for id, seeded in missing]
    return sorted(remaining, key=lambda question: len(question.tokens))


def _unknown(drafter: str, valid: Any) -> ConfigError:
    return ConfigError(
        f"answers_drafter {shorten(drafter)} is not a drafter{suggest_name(drafter, valid)}"
    )
