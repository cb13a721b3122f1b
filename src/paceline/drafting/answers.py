"""The answers in a collection as drafters use them: renewed while they run, without some of them.

`collect` builds the index (`store.answers`) between decoding and replaying, often in a process whose
drafters are loaded already, so a drafter looks for a new one whenever it starts rows. A drafter that is
replayed on a collected prompt must not see the answers to it, so these can be left out.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from paceline.errors import ConfigError
from paceline.store.answers import END, manifest_path, open_answers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from paceline.drafting.base import BuildContext
    from paceline.models.vocabulary import Vocabulary
    from paceline.store.answers import AnswerIndex

_NONE_LEFT_OUT = np.empty(0, dtype=np.int64)


class Answers:
    """The index of one collection, for one drafter.

    index: the mapped index, None before there is one. left_out: the sorted ranks [X] int64 of the places
    that are not to be seen. version: changes with both.
    """

    def __init__(self, name: str, collection: Path, tokenizer: str, target: str) -> None:
        """name: of the drafter. Raises StoreError if the index is damaged or of another model."""
        compile_kernels()
        self._name, self._collection = name, collection
        self._made_with = tokenizer, target
        self._stamp: tuple[int, ...] | None = None
        self._group: str | None = None
        self.index: AnswerIndex | None = None
        self.left_out = _NONE_LEFT_OUT
        self.version = 0
        self.refresh()

    def refresh(self) -> None:
        """Open the index if it was renewed. An index that was deleted stays open."""
        try:
            status = manifest_path(self._collection).stat()
        except (FileNotFoundError, NotADirectoryError):
            return
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self.index = open_answers(self._collection, *self._made_with) or self.index
            self._stamp = stamp
            self._leave_out()

    @contextmanager
    def without(self, group: str) -> Iterator[None]:
        """Leave out the answers to a prompt in the block, also those of a renewed index."""
        before, self._group = self._group, group
        self.refresh()
        self._leave_out()
        try:
            yield
        finally:
            self._group = before
            self._leave_out()

    def _leave_out(self) -> None:
        from paceline.drafting import answer_kernels

        self.version += 1
        self.left_out = _NONE_LEFT_OUT
        if self.index is None or self._group is None:
            return
        index = self.index
        ranks = [
            answer_kernels.ranks_of(index.tokens, index.order, first, last)
            for first, last in index.spans_of(self._group)
        ]
        if ranks:
            self.left_out = np.sort(np.concatenate(ranks))

    def left_out_answers(self) -> list[np.ndarray]:
        """Return the tokens [.] int32 of each answer that is left out."""
        if self.index is None or self._group is None:
            return []
        return [self.index.tokens[a : b - 1] for a, b in self.index.spans_of(self._group)]

    @property
    def note(self) -> str:
        """The remark that there is no index yet, else empty."""
        if self.index is not None:
            return ""
        return (
            f"drafter '{self._name}': no answers in {self._collection} yet, so it drafts without them; "
            "`paceline collect PROMPTS`, with this folder as the store, adds them"
        )

    def num_bytes(self) -> int:
        """Return the bytes of the mapped arrays, which all processes share."""
        return 0 if self.index is None else self.index.num_bytes()


def check_answers(collection: Path | None, vocabulary: Vocabulary) -> None:
    """Raise StoreError if a collection's index is damaged or of another tokenizer."""
    if collection is not None:
        open_answers(collection, vocabulary.hash())


def find_answers(name: str, collection: Path | None, context: BuildContext) -> Answers | None:
    """Return the answers that a drafter's setting names, None if it names none."""
    if collection is None:
        return None
    tokenizer, target = context.vocabulary.hash(), context.target.fingerprint()
    return Answers(name, collection, tokenizer, target)


def require_answers(name: str, collection: Path | None, answers: Answers | None) -> None:
    """Raise ConfigError if a drafter's setting names answers that it was not given."""
    if collection is not None and answers is None:
        raise ConfigError(
            f"drafter '{name}': answers are opened for a target; make it with `build`, or name it in a "
            "configuration"
        )


@cache
def compile_kernels() -> None:
    """Compile the kernels that Python calls, so that the first request does not wait."""
    from paceline.drafting import answer_kernels

    tokens = np.array([1, END], dtype=np.int32)
    order = np.array([0, 1], dtype=np.int32)
    for array in (tokens, order):
        array.setflags(write=False)  # as the mapped ones
    suffix = np.array([1], dtype=np.int32)
    answer_kernels.ranks_of(tokens, order, 0, 2)
    answer_kernels.occurrences(tokens, order, _NONE_LEFT_OUT, suffix)
