"""The target's distributions along its answers: stored once, or computed for each batch.

Stored are the k most probable tokens per learned position, in Parquet next to the answers; several
students share them. Symbols: n learned positions, k tokens per position, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import torch

from paceline.distillation.batches import collate, first_learned, in_order
from paceline.distillation.reading import hidden_states, with_sources
from paceline.distillation.teachers import LiveTeacher, StoredTeacher
from paceline.errors import ConfigError, StoreError
from paceline.models.output_head import OutputHead
from paceline.models.packing import Span
from paceline.store import ShardStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from paceline.contracts import Progress
    from paceline.distillation.batches import Batch, Example
    from paceline.distillation.settings import DistillSettings
    from paceline.models.language_model import LanguageModel

_KIND: Final = "distributions"
_SCHEMA: Final = pa.schema(
    [("id", pa.string()), ("token_ids", pa.binary()), ("probabilities", pa.binary())]
)
_ID, _PROBABILITY = np.dtype("<i4"), np.dtype("<f2")
_BATCH_TOKENS: Final = 4096
_SHARD: Final = 256  # texts


@dataclass(frozen=True, slots=True)
class LiveDistributions:
    """The target itself, which runs on each batch."""

    hidden: Callable[[Batch], Tensor]  # [n, D] at the learned positions
    unembed: Callable[[Tensor], Tensor]  # [m, D] -> [m, V]
    temperature: float

    @classmethod
    def of(cls, target: LanguageModel, temperature: float) -> LiveDistributions:
        """Return the distributions of a target at a temperature."""
        if target.forward_kind == "compiled":
            return cls(partial(_packed_hidden, target), target.unembed, temperature)
        model = target.model
        return cls(partial(hidden_states, model), OutputHead(model, target.name), temperature)

    @torch.inference_mode()
    def teacher(self, batch: Batch, examples: Sequence[Example]) -> LiveTeacher:
        """Return the distributions at a batch's learned positions."""
        hidden = self.hidden(batch)
        return LiveTeacher(hidden, self.unembed, self.temperature, batch.tokens.device)


@dataclass(frozen=True, slots=True)
class StoredDistributions:
    """The stored tokens and probabilities of texts, in memory."""

    ids: Tensor  # [N, k] int32, of all texts one after the other
    probabilities: Tensor  # [N, k] float16
    places: Mapping[str, slice]  # id of a text -> its positions among the N

    def teacher(self, batch: Batch, examples: Sequence[Example]) -> StoredTeacher:
        """Return the distributions at a batch's learned positions."""
        device = batch.tokens.device
        counts = torch.bincount(batch.examples, minlength=len(examples)).tolist()
        parts = []
        for example, count in zip(examples, counts, strict=True):
            end = self.places[example.id].stop
            # the learned positions are a text's last ones
            parts.append(slice(end - count, end))
        ids = torch.cat([self.ids[part] for part in parts])
        probabilities = torch.cat([self.probabilities[part] for part in parts])
        return StoredTeacher(ids.to(device), probabilities.to(device))


def _packed_hidden(target: LanguageModel, batch: Batch) -> Tensor:
    """Return `hidden_states` of a target's own forward; compiled, it is several times as fast.

    An encoder reads one source after the other.
    """
    tokens, places = batch.tokens, batch.places
    slots = [target.acquire() for _ in range(len(tokens))]
    try:
        if target.encoder is not None:
            read = with_sources(batch, target.encoder.start)
            tokens, places = read.tokens, read.places
            for slot, source, num in zip(slots, read.sources, batch.num_prompt, strict=True):
                target.begin(slot, source[: int(num)].tolist())
        # padding comes last in a row, so no learned position sees it
        spans = [Span(slot, 0, tokens.shape[1], prefill=True) for slot in slots]
        return target.forward(tokens.flatten(), spans)[places]
    finally:
        for slot in slots:
            target.release(slot)


def check_top_k(target: LanguageModel, settings: DistillSettings) -> None:
    """Raise ConfigError if a cached teacher would have as many tokens as the target or more."""
    if settings.teacher == "cached" and settings.teacher_top_k >= target.num_logits:
        raise ConfigError(
            f"teacher_top_k {settings.teacher_top_k} is not below the target's {target.num_logits} "
            "tokens; choose a smaller one, or teacher 'live', which uses all"
        )


def open_distributions(
    folder: Path, target: LanguageModel, settings: DistillSettings
) -> ShardStore:
    """Return the store of a target's distributions.

    folder: of the answers, with a store for each combination of settings. Raises ConfigError as
    `check_top_k` does, StoreError for another target's store.
    """
    check_top_k(target, settings)
    top_k, temperature = settings.teacher_top_k, settings.teacher_temperature
    with_prompts = settings.prompt_weight > 0
    name = f"top-{top_k}" + (f"-t{temperature:g}" if temperature != 1 else "")
    identity = {
        "target": target.fingerprint(),
        "top_k": top_k,
        "temperature": temperature,
        "with_prompts": with_prompts,
    }
    where = folder / "distributions" / (name + ("-prompts" if with_prompts else ""))
    return ShardStore(where, _KIND, _SCHEMA, identity, "delete this folder; it is computed again")


def store_distributions(
    target: LanguageModel,
    examples: Sequence[Example],
    store: ShardStore,
    on_done: Callable[[int], None] = lambda num_texts: None,
) -> None:
    """Compute and store the distributions of the texts that the store lacks. Resumes.

    on_done: receives the number of texts done so far, with those that were stored before.
    """
    top_k, temperature = store.identity["top_k"], store.identity["temperature"]
    weight = 1.0 if store.identity["with_prompts"] else 0.0
    stored = store.ids()
    missing = [example for example in examples if example.id not in stored]
    done = len(examples) - len(missing)
    live = LiveDistributions.of(target, temperature)
    for first in range(0, len(missing), _SHARD):
        shard = missing[first : first + _SHARD]
        rows = []
        for members in in_order([len(e.tokens) for e in shard], _BATCH_TOKENS):
            part = [shard[i] for i in members]
            rows += list(_rows(live, part, weight, top_k))
            done += len(part)
            on_done(done)
        store.append(rows)


def _rows(
    live: LiveDistributions, examples: Sequence[Example], prompt_weight: float, top_k: int
) -> Iterator[dict[str, Any]]:
    batch = collate(examples, prompt_weight)
    teacher = live.teacher(batch, examples)
    ids, probabilities = [], []
    with torch.inference_mode():
        for part in torch.arange(len(batch.targets)).split(512):
            _, p = teacher.buckets(slice(int(part[0]), int(part[-1]) + 1))
            top = p.topk(top_k)
            ids.append(top.indices.cpu())
            probabilities.append(top.values.cpu())
    all_ids = torch.cat(ids).numpy().astype(_ID)
    all_probabilities = torch.cat(probabilities).numpy().astype(_PROBABILITY)
    owners = batch.examples.numpy()
    for i, example in enumerate(examples):
        own = owners == i
        yield {
            "id": example.id,
            "token_ids": all_ids[own].tobytes(),
            "probabilities": all_probabilities[own].tobytes(),
        }


def read_distributions(
    stores: Sequence[ShardStore], examples: Sequence[Example]
) -> StoredDistributions:
    """Return the stored distributions of texts. The stores have the same settings.

    Raises StoreError if a text has another number of positions in a store: that is of another answer.
    """
    identity = stores[0].identity
    width, prompt_weight = identity["top_k"], float(identity["with_prompts"])
    wanted = {e.id: len(e.tokens) - 1 - first_learned(e, prompt_weight) for e in examples}
    ids, probabilities, places, place = [], [], {}, 0
    for store in stores:
        table = store.read()
        tokens, shares = table.column("token_ids"), table.column("probabilities")
        for i, name in enumerate(table.column("id").to_pylist()):
            if name not in wanted or name in places:
                continue
            count = len(tokens[i].as_buffer()) // _ID.itemsize
            if count != wanted[name] * width:
                raise StoreError(
                    f"{store.folder}: has {count // width} positions of {name!r}, whose text has "
                    f"{wanted[name]}; delete this folder; it is computed again"
                )
            ids.append(np.frombuffer(tokens[i].as_buffer(), _ID))
            probabilities.append(np.frombuffer(shares[i].as_buffer(), _PROBABILITY))
            places[name] = (place, place + count)
            place += count
    return StoredDistributions(
        torch.from_numpy(np.concatenate(ids).reshape(-1, width)),
        torch.from_numpy(np.concatenate(probabilities).reshape(-1, width)),
        {name: slice(first // width, end // width) for name, (first, end) in places.items()},
    )


def gather_distributions(
    target: LanguageModel,
    texts: Sequence[tuple[Path, Sequence[Example]]],
    settings: DistillSettings,
    on_progress: Progress,
) -> StoredDistributions:
    """Return the distributions along the texts of several folders, after computing the missing ones.

    Raises ConfigError and StoreError as `open_distributions` and `read_distributions` do.
    """
    total = sum(len(examples) for _, examples in texts)
    stores: list[ShardStore] = []
    before = 0
    for folder, examples in texts:
        store = open_distributions(folder, target, settings)
        report = partial(_report_after, on_progress, before, total)
        store_distributions(target, examples, store, report)
        before += len(examples)
        stores.append(store)
    return read_distributions(stores, [example for _, own in texts for example in own])


def _report_after(on_progress: Progress, before: int, total: int, done: int) -> None:
    on_progress("distributions", before + done, total)
