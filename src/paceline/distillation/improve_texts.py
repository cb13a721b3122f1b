"""The texts of an improvement: a log's parts, and answers of prompt files to mix in.

A log grows while it is read, so the texts of an unfinished run are recorded in its folder.
Knows no training.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from paceline.distillation.logged import (
    num_conversations,
    prompt_key,
    read_requests,
    split_by_prompt,
)
from paceline.distillation.preparation import prepare_texts
from paceline.distillation.run import LOCK
from paceline.errors import ConfigError
from paceline.files import write_atomically
from paceline.store import TrainedOn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from paceline.assembly import Pace
    from paceline.contracts import Progress
    from paceline.distillation.batches import Example
    from paceline.distillation.improve_settings import ImproveSettings
    from paceline.distillation.logged import LogSplit
    from paceline.store import LoggedDecision

_RECORD: Final = "texts.json"


@dataclass(slots=True)
class ImproveTexts:
    """The texts of an improvement.

    left_out: reason -> number of logged requests. data: answers of prompt files, by the folder of the
    answers; data_prompts: the prompts of these files.
    """

    split: LogSplit
    left_out: dict[str, int]
    conversations: int
    data: dict[Path, list[Example]] = field(default_factory=dict)
    data_prompts: TrainedOn = field(default_factory=lambda: TrainedOn.of([]))

    @property
    def training(self) -> list[Example]:
        """The texts to train on, logged ones first."""
        return [*self.split.training, *(e for own in self.data.values() for e in own)]

    @property
    def judged(self) -> list[Example]:
        """The texts that choose weights or judge them."""
        return [*self.split.validation, *self.split.held_out]

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of texts by part, and of the log's conversations."""
        return {
            "training": len(self.training),
            "data": sum(map(len, self.data.values())),
            "validation": len(self.split.validation),
            "held_out": len(self.split.held_out),
            "conversations": self.conversations,
        }


def read_log(
    pace: Pace,
    decisions: Sequence[LoggedDecision],
    settings: ImproveSettings,
    context: int,
    may_judge: Callable[[Example], bool],
    record: TextRecord,
) -> ImproveTexts:
    """Return a log's texts in parts, cut at `context` tokens; those of an unfinished run if it had any.

    may_judge: see `split_by_prompt`. Raises ConfigError if a part has too few texts.
    """
    target, tokenizer = pace.parts.target.fingerprint(), pace.parts.vocabulary.hash()
    read = read_requests(decisions, target, tokenizer, context)
    examples = record.freeze(read.examples)
    split = split_by_prompt(examples, settings.held_out, settings.validation_share, may_judge)
    texts = ImproveTexts(split, read.left_out, num_conversations(examples))
    _check_numbers(texts, len(decisions), settings)
    return texts


def _check_numbers(texts: ImproveTexts, num_logged: int, settings: ImproveSettings) -> None:
    counts, least = texts.counts, settings.least_held_out
    why = "; ".join(f"{count} {reason}" for reason, count in texts.left_out.items())
    if not counts["conversations"]:
        raise ConfigError(
            f"none of {num_logged} logged requests can train a drafter: {why or 'the log is empty'}"
        )
    if counts["held_out"] < least or not counts["training"] or not counts["validation"]:
        ignored = f" (requests left out: {why})" if why else ""
        needed = math.ceil(least / settings.held_out)
        raise ConfigError(
            f"the log has {counts['conversations']} different prompts or conversations{ignored}: "
            f"{counts['training']} answers to train on, {counts['validation']} to validate on and "
            f"{counts['held_out']} held out, where 1, 1 and {least} are needed; about {needed} prompts "
            f"are enough at held_out {settings.held_out:g}: serve more, then run the command again"
        )


class TextRecord:
    """The record of an unfinished run's texts, in its folder."""

    def __init__(self, part: Path, models: bytes) -> None:
        """models: a digest of the models that the folder's files depend on."""
        self._part, self._models = part, models.hex()

    def freeze(self, examples: list[Example]) -> list[Example]:
        """Return the texts that the unfinished run had, or all of them for a new run.

        The files of a run with other models, or with texts that the log no longer has, are removed.
        """
        path = self._part / _RECORD
        by_id = {example.id: example for example in examples}
        if path.is_file():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                models, ids = saved["models"], saved["ids"]
            except (ValueError, KeyError, TypeError):
                models, ids = "", []  # damaged: a new run
            if models == self._models and by_id.keys() >= set(ids):
                return [by_id[id] for id in ids]
        for old in self._part.iterdir():
            if old.name == LOCK:  # held: another process would get a new one
                continue
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        record = {"models": self._models, "ids": list(by_id)}
        write_atomically(path, json.dumps(record).encode())
        return examples


def add_data(
    texts: ImproveTexts,
    pace: Pace,
    data: Sequence[Path],
    settings: ImproveSettings,
    on_progress: Progress,
) -> None:
    """Add answers of prompt files up to their share of the tokens, except to prompts that judge.

    Raises as `prepare_texts` does.
    """
    share = settings.data_share
    logged = sum(len(example.tokens) for example in texts.split.training)
    room = int(logged * share / (1 - share))
    judged = {prompt_key(example) for example in texts.judged}
    prepared = prepare_texts(pace, data, (), settings, on_progress)
    texts.data_prompts = prepared.trained_on
    pairs = [(e, file.folder) for file in prepared.files for e in file.training]
    # by a hash, so that every file has its share
    pairs.sort(key=lambda pair: hashlib.sha256(pair[0].id.encode()).digest())
    for example, folder in pairs:
        if room < len(example.tokens):
            break
        if prompt_key(example) not in judged:
            texts.data.setdefault(folder, []).append(example)
            room -= len(example.tokens)
